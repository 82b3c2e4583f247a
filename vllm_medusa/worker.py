"""vLLM's GPU worker with the tree-verifying model runner."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_medusa.front_end import CUDA_BACKENDS
from vllm_medusa.step_timer import measure_steps


class MedusaWorker(Worker):
    """``worker_cls`` on NVIDIA GPUs; works under every executor, Ray included."""

    def init_device(self) -> None:
        """Register the attention backend in this process, then start as usual."""
        attention = self.vllm_config.speculative_config.attention
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKENDS[attention])
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        """Warm up and capture as usual; then time the steps, where their nodes follow the time."""
        times = super().compile_or_warm_up_model()
        config = self.vllm_config.speculative_config
        # vLLM drops the schedule under data parallelism; a pipeline stage's time is not the step's.
        is_scheduled = config.num_speculative_tokens_per_batch_size is not None
        stages = self.parallel_config.pipeline_parallel_size
        if config.node_frequencies and is_scheduled and stages == 1:
            costs = measure_steps(self.model_runner)
            if self.rank == 0:
                costs.save(config.costs_file(self.vllm_config.instance_id))
        return times

    def _make_model_runner(self):
        from vllm_medusa.gpu_runner import MedusaModelRunner

        return MedusaModelRunner(self.vllm_config, self.device)

    def medusa_head_bytes(self) -> int:
        """Memory that the heads take on this rank, for ``LLM.collective_rpc``."""
        return self.model_runner.head_bytes()

    def load_model(self, **kwargs) -> None:
        """Load the models, then build what verifies their trees outside the pool of weights."""
        super().load_model(**kwargs)
        self.model_runner.build_verifier()
