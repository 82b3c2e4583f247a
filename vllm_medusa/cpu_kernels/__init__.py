"""PyTorch and NumPy fall-backs of the Triton kernels of vLLM's V2 model runner.

They let the V2 runner work on a CPU without a Triton that compiles for CPUs and
without ``TRITON_INTERPRET=1``. Nothing is imported here: Triton loads the
subpackage ``triton_stub`` on every ``import triton``.
"""


def register() -> bool:
    """Route the V2 runner's kernels to the fall-backs, once a process.

    For the worker process, before the model runner is built.

    Returns
    -------
    bool
        True when the fall-backs are in place; False when they are not wanted: on a
        GPU, under ``TRITON_INTERPRET=1``, or with a Triton that compiles for CPUs.
    """
    from vllm_medusa.cpu_kernels.activation import register_fallbacks

    return register_fallbacks()


def install() -> bool:
    """Have every vLLM worker on this CPU call :func:`register` as it starts.

    For the plugin's entry point. Listing a Triton backend named ``cpu`` makes vLLM
    choose the V2 runner for any model and drop its own fall-backs for the V1 runner;
    this keeps both working, whether or not Medusa is used.

    Returns
    -------
    bool
        As :func:`register`.
    """
    from vllm_medusa.cpu_kernels.activation import hook_platform

    return hook_platform()
