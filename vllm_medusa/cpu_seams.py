"""Names of vLLM's CPU code that this project relies on, and why; beside ``vllm_seams.py``.

Made for vLLM 0.32.

==============================================  =====================================
name                                            why there is no other way
==============================================  =====================================
cpu.model_runner.CPUModelRunner                 CPUWorker.init_device builds it inline
_custom_ops.cpu_attn_reshape_and_cache          writes known rows, to check at start-up that
                                                the packed CPU cache is laid out as we read it
layers.utils.dispatch_cpu_unquantized_gemm      the only place where a CPU layer's product is
                                                chosen; the row product has to be chosen there
_custom_ops.create_onednn_mm, _C.onednn_mm      what it would have chosen, for many rows
triton_utils.triton.next_power_of_2             vLLM's stand-in for Triton lacks it
==============================================  =====================================
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

from vllm_medusa.vllm_seams import replaced


def cpu_ops() -> Any:
    """vLLM's compiled CPU operations."""
    from vllm import _custom_ops

    return _custom_ops


def make_onednn_product(weight: Any) -> Any | None:
    """oneDNN's product with a weight [out_features, in_features]; None where it has none.

    The object owns a packed copy; its ``handler_tensor`` is what :func:`onednn_product` takes.
    """
    # Shapes whose plans oneDNN keeps, as in vLLM's own layers.
    num_plans = 32
    try:
        return cpu_ops().create_onednn_mm(weight.t(), num_plans)
    except (AttributeError, RuntimeError):
        return None


def onednn_product(out: Any, x: Any, bias: Any | None, handler: Any) -> None:
    """``x @ weight.T + bias`` into ``out``, all two-dimensional."""
    import torch

    torch.ops._C.onednn_mm(out, x, bias, handler)


def complete_triton_stand_in() -> None:
    """Give vLLM's stand-in for Triton the one function that the V2 runner's host code calls."""
    from vllm.triton_utils import HAS_TRITON, triton

    if not HAS_TRITON:
        triton.next_power_of_2 = lambda n: 1 << max(0, n - 1).bit_length()


def cpu_runner_class(runner_cls: type) -> contextlib.AbstractContextManager:
    """While active, ``CPUWorker.init_device`` builds ``runner_cls``."""
    return replaced("vllm.v1.worker.cpu.model_runner", "CPUModelRunner", runner_cls)


def cpu_product_dispatch(make: Callable[[Callable], Callable]) -> contextlib.AbstractContextManager:
    """While active, layers that finish loading choose their product with ``make(original)``."""
    name, module = "dispatch_cpu_unquantized_gemm", "vllm.model_executor.layers.utils"
    return replaced(module, name, make(getattr(importlib.import_module(module), name)))
