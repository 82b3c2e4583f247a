"""Linear layers of a CPU target: few rows by :mod:`vllm_medusa.cpu_rows`, many by oneDNN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from vllm import envs

from vllm_medusa import cpu_rows
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.vllm_seams import cpu_ops

# More rows than the largest tree of a single request go to oneDNN, whose blocking pays then:
# on two Zen 3 cores 16 rows take 33 ms here and 48 ms there, 64 rows about as long.
MOST_ROWS = 48
# As oneDNN's products of vLLM's own layers.
PRIMITIVE_CACHE_SIZE = 32

_library = torch.library.Library("vllm_medusa", "FRAGMENT")
_library.define("rows_product(Tensor x, Tensor panels, Tensor? bias, Tensor handler) -> Tensor")


@functools.cache
def kernels() -> cpu_rows.RowKernels | None:
    """The kernels of this process; None where there is no compiler."""
    return cpu_rows.load(Path(envs.VLLM_CACHE_ROOT) / "vllm_medusa")


def rows_product(
    x: torch.Tensor,  # [..., in_features] float32
    panels: torch.Tensor,  # [out_features / 16, in_features, 16] float32
    bias: torch.Tensor | None,  # [out_features]
    handler: torch.Tensor,  # [] int64, address of oneDNN's product of the same weight
) -> torch.Tensor:
    """``x @ weight.T + bias``, [..., out_features]; one operation, so that graphs keep it."""
    flat = x.reshape(-1, panels.shape[1])
    if flat.shape[0] > MOST_ROWS:
        out = x.new_empty(flat.shape[0], panels.shape[0] * cpu_rows.PANEL)
        torch.ops._C.onednn_mm(out, flat, bias, handler)
    else:
        out = cpu_rows.product(kernels(), flat, panels)
        if bias is not None:
            out.add_(bias)
    return out.view(*x.shape[:-1], -1)


def _result_shape(x, panels, bias, handler):
    return x.new_empty((*x.shape[:-1], panels.shape[0] * cpu_rows.PANEL))


_library.impl("rows_product", rows_product, "CPU")
torch.library.register_fake("vllm_medusa::rows_product", _result_shape, lib=_library)


def make_dispatch(original: Callable) -> Callable:
    """vLLM's choice of a product for a loaded layer, with ours where it can serve."""

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight.data
        if weight.is_meta or not cpu_rows.can_pack(weight) or not _multiplies(layer):
            original(layer, remove_weight)
            return
        panels = cpu_rows.pack(weight)
        many_rows = cpu_ops().create_onednn_mm(weight.t(), PRIMITIVE_CACHE_SIZE)
        handler = many_rows.handler_tensor
        # oneDNN's copy is freed with the Python object that stands for it.
        layer.many_rows_product = many_rows
        if remove_weight:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)

        def cpu_linear(x, weight, bias):
            return torch.ops.vllm_medusa.rows_product(x, panels, bias, handler)

        layer.cpu_linear = cpu_linear

    return dispatch


def pack_lm_head(heads: MedusaHeads) -> None:
    """Let heads with one lm_head for all of them multiply by panels."""
    if kernels() is None or heads.lm_head is None or heads.lm_head.shape[0] != 1:
        return
    weight = heads.lm_head.data[0]
    if not cpu_rows.can_pack(weight):
        return
    panels = cpu_rows.pack(weight)

    def product(states: torch.Tensor) -> torch.Tensor:
        if states.shape[0] > MOST_ROWS:
            return torch.nn.functional.linear(states, weight)
        return cpu_rows.product(kernels(), states, panels)

    heads.lm_head_product = product


def _multiplies(layer: torch.nn.Module) -> bool:
    """Not an embedding table, which is only looked up (a tied lm_head is a layer of its own)."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, (LinearBase, ParallelLMHead))
