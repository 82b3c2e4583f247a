"""A clear error for kernels without a fall-back.

Without a usable Triton, vLLM's kernels are plain functions, and launching one says
"'function' object is not subscriptable".
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_RUNNER_MODULES = "vllm.v1.worker.gpu."

# Part of a kernel's qualified name -> what makes vLLM launch it.
_CAUSES = (
    ("sample.batch_shard", "Batch-sharded sampling"),
    ("sample.watermark", "Watermarking (watermark_config)"),
    ("cp_utils", "Decode context parallelism (decode_context_parallel_size > 1)"),
    ("mamba", "A model with Mamba layers"),
    ("recoverssm", "A model with Mamba layers"),
    ("acceptance_estimator", "Adaptive verification of drafts"),
    ("rejection_sampler_utils", "Block verification of drafts"),
    ("spec_decode", "This speculative method"),
)


def cause_of(kernel: str) -> str:
    """Name the feature that needs a kernel.

    Parameters
    ----------
    kernel : str
        Qualified name, ``module.function``.

    Returns
    -------
    str
        ``"vllm.v1.worker.gpu.sample.watermark._philox_gumbel_kernel"`` gives
        ``"Watermarking (watermark_config)"``; a kernel of no known feature its module.
    """
    for part, cause in _CAUSES:
        if part in kernel:
            return cause
    return f"Module {kernel.rpartition('.')[0]}"


def _takes_constexpr(function: Callable[..., Any]) -> bool:
    """Tell a kernel from other functions by its compile-time arguments."""
    from vllm.triton_utils import tl

    return any(
        annotation is tl.constexpr or str(annotation).endswith("tl.constexpr")
        for annotation in function.__annotations__.values()
    )


def uncovered_kernels() -> Iterator[str]:
    """Yield the qualified names of the V2 runner's kernels that have no fall-back.

    Of the modules imported so far, and after the fall-backs are registered: those
    kernels are no plain functions any more.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(_RUNNER_MODULES):
            for attribute, value in list(vars(module).items()):
                own = inspect.isfunction(value) and value.__module__ == name
                if own and _takes_constexpr(value):
                    yield f"{name}.{attribute}"


def make_refusal(kernel: str) -> Callable[..., NoReturn]:
    """Make the stand-in that refuses a launch of ``kernel`` and names its cause.

    Parameters
    ----------
    kernel : str
        Qualified name of the kernel.

    Returns
    -------
    callable
        Raises RuntimeError whatever its arguments.
    """

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"{cause_of(kernel)} needs the Triton kernel {kernel}, which has no PyTorch fall-back "
            "in vllm-medusa, and Triton cannot compile for this CPU. Leave the feature out, or "
            "use a GPU."
        )

    return refuse
