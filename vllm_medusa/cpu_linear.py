"""Linear layers of a CPU target: few rows by :mod:`vllm_medusa.cpu_rows`, many by oneDNN."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_medusa import cpu_rows, cpu_seams
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.sequential_heads import SequentialHeads

logger = init_logger(f"vllm.{__name__}")

# More rows go to oneDNN. On two Zen 3 cores the row product is the faster one at any number
# (64 rows: 92 against 135 ms, 256 rows: 371 against 486 ms); with AVX-512 oneDNN's vectors are
# twice as wide as ours, so there it gets all but the trees of one request.
MOST_ROWS = 48 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 256

_library = torch.library.Library("vllm_medusa", "FRAGMENT")
_library.define("rows_product(Tensor x, Tensor panels, Tensor? bias, Tensor handler) -> Tensor")


@functools.cache
def kernels() -> cpu_rows.RowKernels | None:
    """The kernels of this process; None, said once, where they cannot be had."""
    try:
        return cpu_rows.load(Path(envs.VLLM_CACHE_ROOT) / "vllm_medusa")
    except OSError as error:
        logger.warning(
            "Medusa: oneDNN multiplies the rows of a tree, at a higher price each: %s", error
        )
        return None


def rows_product(
    x: torch.Tensor,  # [..., in_features] float32
    panels: torch.Tensor,  # as `cpu_rows.pack` returns them
    bias: torch.Tensor | None,  # [out_features]
    handler: torch.Tensor,  # [] int64, address of oneDNN's product of the same weight
) -> torch.Tensor:
    """``x @ weight.T + bias``, [..., out_features]; one operation, so that graphs keep it."""
    if x.numel() > MOST_ROWS * panels.shape[1]:
        out = _result_shape(x, panels, bias, handler)
        flat = x.reshape(-1, x.shape[-1])
        cpu_seams.onednn_product(out.view(flat.shape[0], -1), flat, bias, handler)
        return out
    out = cpu_rows.product(kernels(), x, panels)
    return out if bias is None else out.add_(bias)


def _result_shape(
    x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, handler: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], panels.shape[0] * cpu_rows.PANEL))


_library.impl("rows_product", rows_product, "CPU")
torch.library.register_fake("vllm_medusa::rows_product", _result_shape, lib=_library)


def make_dispatch(original: Callable) -> Callable:
    """vLLM's choice of a product for a loaded layer, with ours where it can serve."""

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight.data
        # An embedding table is only looked up; a tied lm_head is a layer of its own.
        multiplies = isinstance(layer, (LinearBase, ParallelLMHead))
        if weight.is_meta or not multiplies or not cpu_rows.can_pack(weight):
            original(layer, remove_weight)
            return
        many_rows = cpu_seams.make_onednn_product(weight)
        if many_rows is None:
            original(layer, remove_weight)
            return
        panels, handler = cpu_rows.pack(weight), many_rows.handler_tensor
        # oneDNN's copy is freed with the Python object that stands for it.
        layer.many_rows_product = many_rows
        layer.panels_dtype = panels.dtype
        if remove_weight:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

        def cpu_linear(x, weight, bias):
            return torch.ops.vllm_medusa.rows_product(x, panels, bias, handler)

        layer.cpu_linear = cpu_linear

    return dispatch


def packed_layers(model: torch.nn.Module) -> str:
    """A digest of which layers multiply by panels, and of the panels' dtypes."""
    found = {
        name: str(layer.panels_dtype)
        for name, layer in model.named_modules()
        if hasattr(layer, "panels_dtype")
    }
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def pack_lm_head(heads: MedusaHeads | SequentialHeads) -> None:
    """Let heads with one lm_head for all of them multiply by panels."""
    if heads.spec.num_lm_heads != 1:
        return
    weight = (heads.lm_head.weight if heads.spec.sequential else heads.lm_head).data[0]
    if not cpu_rows.can_pack(weight) or kernels() is None:
        return
    panels = cpu_rows.pack(weight)

    def product(states: torch.Tensor) -> torch.Tensor:
        if states.shape[0] > MOST_ROWS:
            return torch.nn.functional.linear(states, weight)
        return cpu_rows.product(kernels(), states, panels)

    heads.lm_head_product = product
