"""The stock V2 runner on a CPU with this project's kernel fall-backs and nothing else."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_medusa.cpu_kernels.v2_runner import enable_v2_runner


class PlainV2CPUWorker(CPUWorker):
    """``worker_cls`` of the baseline."""

    def init_device(self) -> None:
        """Register the fall-backs, start as usual."""
        enable_v2_runner()
        # Its speculator asks for Triton by name; its two kernels have fall-backs.
        from vllm.v1.worker.gpu.spec_decode.ngram import speculator

        speculator.HAS_TRITON = True
        super().init_device()
