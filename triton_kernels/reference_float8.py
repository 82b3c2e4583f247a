"""Plain PyTorch twin of the product with float8 weights; needs no Triton."""

from __future__ import annotations

import torch
from torch.nn import functional

from .checks_float8 import check_float8_product


def float8_product(
    out: torch.Tensor,  # [G, N, O]
    inputs: torch.Tensor,  # [G or 1, N, I]
    weight: torch.Tensor,  # [G, O, I] float8_e4m3fn
    scale: torch.Tensor,  # [G, O] float32
    *,
    states: torch.Tensor | None = None,  # [G or 1, N, O]
    bias: torch.Tensor | None = None,  # [G, O]
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.float8.float8_product`."""
    check_float8_product(out, inputs, weight, scale, states, bias)
    total = inputs.float() @ weight.float().transpose(1, 2) * scale[:, None]
    if bias is not None:
        total += bias.float()[:, None]
    out.copy_(total if states is None else states.float() + functional.silu(total))
