"""vLLM's CPU worker with the tree-verifying model runner."""

from __future__ import annotations

import contextlib

# Imported first: it patches torch.cuda's streams and events for the V2 runner.
from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from vllm_medusa import cpu_linear, cpu_seams
from vllm_medusa.cpu_kernels.v2_runner import enable_v2_runner
from vllm_medusa.front_end import CPU_BACKEND
from vllm_medusa.runner import TreeRunnerMixin


def _row_products() -> contextlib.AbstractContextManager:
    """While active, layers that finish loading choose this project's products, if there are any."""
    if cpu_linear.kernels() is None:
        return contextlib.nullcontext()
    return cpu_seams.cpu_product_dispatch(cpu_linear.make_dispatch)


class MedusaCPUModelRunner(TreeRunnerMixin, CPUModelRunner):
    """The V2 runner on a CPU."""

    def load_model(self, *args, **kwargs) -> None:
        """Load the target with products that verify a few rows at the price of one."""
        with _row_products():
            super().load_model(*args, **kwargs)
        if cpu_linear.kernels() is not None:
            self.speculative_config.packed_layers = cpu_linear.packed_layers(self.model)

    def reload_weights(self, *args, **kwargs) -> None:
        """Give new weights the same products."""
        with _row_products():
            super().reload_weights(*args, **kwargs)


class MedusaCPUWorker(CPUWorker):
    """``worker_cls`` on CPUs."""

    def init_device(self) -> None:
        """Register kernels and the attention backend in this process, then start as usual."""
        enable_v2_runner()
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
        with cpu_seams.cpu_runner_class(MedusaCPUModelRunner):
            super().init_device()

    def medusa_head_bytes(self) -> int:
        """Memory that the heads take on this rank, for ``LLM.collective_rpc``."""
        return self.model_runner.head_bytes()

    def load_model(self, **kwargs) -> None:
        """Load the models, then build what verifies their trees outside the pool of weights."""
        super().load_model(**kwargs)
        self.model_runner.build_verifier()
