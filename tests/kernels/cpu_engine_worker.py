"""vLLM's CPU worker with the fall-backs and nothing else of this project."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_medusa.cpu_kernels.v2_runner import enable_v2_runner


class FallbackWorker(CPUWorker):
    """``worker_cls`` of the V2 runner without Triton."""

    def init_device(self) -> None:
        """Put the fall-backs in force, start as usual."""
        if not enable_v2_runner():
            raise RuntimeError("the fall-backs are not in force: vLLM found a Triton it can use")
        super().init_device()
