"""Plain vLLM on a CPU with the row product of this project: what of a gain is not the tree's."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_medusa import cpu_linear, cpu_seams


class RowProductWorker(CPUWorker):
    """``worker_cls`` of an engine without speculation."""

    def load_model(self, *args, **kwargs) -> None:
        """Load the model with the products that Medusa would give it."""
        if cpu_linear.kernels() is None:
            raise RuntimeError("no compiled row product on this machine; leave --row-products out")
        with cpu_seams.cpu_product_dispatch(cpu_linear.make_dispatch):
            super().load_model(*args, **kwargs)
