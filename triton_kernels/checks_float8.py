"""Argument checks of the product with float8 weights and of its twin; no Triton here."""

from __future__ import annotations

import torch

from .checks import FLOATS, check_tensor, require


def check_float8_product(
    out: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    states: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the arguments are what ``float8_product`` documents."""
    device = inputs.device
    check_tensor("inputs", inputs, shape=[None, None, None], dtype=FLOATS, device=device)
    shape, dtype = [None, None, inputs.shape[2]], torch.float8_e4m3fn
    check_tensor("weight", weight, shape=shape, dtype=dtype, device=device)
    groups, outputs = weight.shape[:2]
    num_rows = inputs.shape[1]
    check_tensor("scale", scale, shape=[groups, outputs], dtype=torch.float32, device=device)
    result = [groups, num_rows, outputs]
    check_tensor("out", out, shape=result, dtype=inputs.dtype, device=device)
    shared = [("inputs", inputs)]
    if states is not None:
        result[0] = None
        check_tensor("states", states, shape=result, dtype=inputs.dtype, device=device)
        shared.append(("states", states))
    for name, tensor in shared:
        found = f"{tensor.shape[0]} groups"
        require(tensor.shape[0] in (1, groups), name, found, f"1 or the weight's {groups}")
    dense = [("weight", weight), ("scale", scale)]
    if bias is not None:
        check_tensor("bias", bias, shape=scale.shape, dtype=inputs.dtype, device=device)
        dense.append(("bias", bias))
    for name, tensor in dense:
        require(tensor.is_contiguous(), name, f"strides {tensor.stride()}", "a contiguous tensor")
