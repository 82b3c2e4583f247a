"""A clear error for kernels without a fall-back, in place of "0 active drivers"."""

from typing import Any, NoReturn

# Part of a kernel's qualified name -> what makes vLLM launch it.
_CAUSES = (
    ("sample.batch_shard", "batch-sharded sampling"),
    ("sample.watermark", "watermarking (watermark_config)"),
    ("prompt_embeds", "prompt embeddings (enable_prompt_embeds)"),
    ("cp_utils", "decode context parallelism (decode_context_parallel_size > 1)"),
    ("mamba", "a model with Mamba layers"),
    ("recoverssm", "a model with Mamba layers"),
    ("acceptance_estimator", "adaptive verification of drafts"),
    ("rejection_sampler_utils", "block verification of drafts"),
    ("spec_decode", "this speculative method"),
    ("attention", "this attention backend"),
)


def cause_of(qualified_name: str) -> str:
    """Name the feature that needs a kernel.

    Parameters
    ----------
    qualified_name : str
        ``module.function`` of the kernel.

    Returns
    -------
    str
        ``"vllm.v1.worker.gpu.sample.watermark._philox_gumbel_kernel"`` gives
        ``"watermarking (watermark_config)"``; an unknown kernel its module.
    """
    for part, cause in _CAUSES:
        if part in qualified_name:
            return cause
    return f"the code of {qualified_name.rpartition('.')[0]}"


def _refuse_launch(kernel: Any, *args: Any, **kwargs: Any) -> NoReturn:
    function = kernel.fn
    name = f"{function.__module__}.{function.__name__}"
    raise RuntimeError(
        f"{cause_of(name)} needs the Triton kernel {name}, which has no PyTorch fall-back on a CPU "
        "without a Triton backend. Leave the feature out, or set TRITON_INTERPRET=1 to interpret "
        "all kernels (an order of magnitude slower)."
    )


def refuse_uncovered_kernels() -> None:
    """Make every launch of a Triton kernel in this process fail with its cause.

    Only for a process in which no kernel can run anyway: one that wants the
    fall-backs (``activation.fallbacks_wanted``). Kernels with a fall-back are no longer
    Triton kernels by then and never come here.
    """
    from triton.runtime.jit import JITFunction

    JITFunction.run = _refuse_launch
