"""Make vLLM's V2 model runner work in this process, on a CPU without a usable Triton."""

from __future__ import annotations

_done = False


def enable_v2_runner() -> bool:
    """Replace the runner's Triton kernels by the fall-backs, once a process.

    For a worker process that is about to build the V2 runner. Nothing is touched
    elsewhere: stock vLLM keeps seeing the Triton that it sees without this package.

    Returns
    -------
    bool
        True when the fall-backs are in force, False where kernels run by themselves:
        on a GPU, or on a CPU whose Triton has a CPU backend.
    """
    global _done
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or HAS_TRITON:
        return False
    if not _done:
        from vllm.triton_utils.dispatcher import register_kernels

        from vllm_medusa.cpu_kernels.refusal import make_refusal, uncovered_kernels
        from vllm_medusa.cpu_kernels.registry import FALLBACKS
        from vllm_medusa.cpu_seams import complete_triton_stand_in

        complete_triton_stand_in()
        register_kernels(FALLBACKS)
        register_kernels({name: make_refusal(name) for name in uncovered_kernels()})
        _done = True
    return True
