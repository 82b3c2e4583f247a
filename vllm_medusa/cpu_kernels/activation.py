"""When the fall-backs are wanted, and how they come into force."""

_registered = False


def fallbacks_wanted() -> bool:
    """Tell whether kernels have nothing better to run on than the fall-backs.

    Returns
    -------
    bool
        True on a CPU whose Triton knows no CPU backend but the inert one of this
        package, unless kernels are interpreted (``TRITON_INTERPRET=1``).
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cpu() or not HAS_TRITON:
        return False
    import triton
    from triton.backends import backends

    if triton.knobs.runtime.interpret:
        return False
    return backends["cpu"].driver.__module__.startswith(f"{__package__}.")


def register_fallbacks() -> bool:
    """Register every fall-back with vLLM's kernel dispatcher; see ``cpu_kernels.register``."""
    global _registered
    if not fallbacks_wanted():
        return False
    if not _registered:
        from vllm.triton_utils.dispatcher import register_kernels

        from vllm_medusa.cpu_kernels.refusal import refuse_uncovered_kernels
        from vllm_medusa.cpu_kernels.registry import FALLBACKS
        from vllm_medusa.cpu_kernels.v1_runner import v1_fallbacks

        register_kernels(FALLBACKS | v1_fallbacks())
        refuse_uncovered_kernels()
        _registered = True
    return True


def hook_platform() -> bool:
    """Let vLLM's CPU platform register the fall-backs; see ``cpu_kernels.install``."""
    if not fallbacks_wanted():
        return False
    from vllm.platforms.cpu import CpuPlatform

    def register_triton_kernel_overrides(cls: type) -> None:
        register_fallbacks()

    CpuPlatform.register_triton_kernel_overrides = classmethod(register_triton_kernel_overrides)
    return True
