"""vLLM's GPU worker with the tree-verifying model runner."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_medusa.front_end import CUDA_BACKEND


class MedusaWorker(Worker):
    """``worker_cls`` on NVIDIA GPUs; works under every executor, Ray included."""

    def init_device(self) -> None:
        """Register the attention backend in this process, then start as usual."""
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)
        super().init_device()

    def _make_model_runner(self):
        from vllm_medusa.runner import MedusaModelRunner

        return MedusaModelRunner(self.vllm_config, self.device)
