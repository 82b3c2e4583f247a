"""Product with weights stored as float8: what drafts cost is reading them, so half the bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_runnable
from .checks_float8 import check_float8_product


class Plan(NamedTuple):
    """How a product is launched; all blocks are powers of two."""

    block_outputs: int  # rows of the weight for each program, at least 16
    block_rows: int  # rows of the inputs for each program, at least 16
    block_size: int  # columns of both for each turn of the program's loop, at least 32
    num_warps: int
    num_stages: int  # turns whose loads are in flight


def plan_for(num_outputs: int, num_rows: int) -> Plan:
    """The launch of a product of ``num_rows`` rows of inputs with ``num_outputs`` of the weight.

    ``num_outputs`` counts those of all groups: they decide how many programs there are.
    """
    # Then programs are few, and each has more bytes in flight. Swept on an H100: 1.6 to 1.8 times
    # as fast as cuBLAS in bfloat16 up to 32 rows; beyond 64, where it is no longer a matter of
    # bytes, as fast with many outputs, three quarters of it with few.
    are_few = num_outputs <= 8192
    block_rows = min(max(triton.next_power_of_2(num_rows), 16), 128 if are_few else 256)
    if block_rows == 16:
        return Plan(32, 16, 256, num_warps=4, num_stages=6 if are_few else 4)
    if block_rows == 32:
        few, many = (32, 32, 256, 4, 6), (64, 32, 128, 4, 4)
    elif block_rows == 64:
        few, many = (64, 64, 256, 4, 4), (64, 64, 128, 4, 4)
    else:
        # Every further block of rows converts the weight again.
        few, many = (64, 128, 64, 4, 6), (128, block_rows, 64, 8, 4)
    return Plan(*(few if are_few else many))


@triton.jit(do_not_specialize=["num_rows"])
def _float8_product_kernel(
    out,  # out [G, N, O]
    inputs,  # in [G or 1, N, I]
    weight,  # in [G, O, I] float8_e4m3fn, dense
    scale,  # in [G, O] float32, dense
    states,  # in [G or 1, N, O], or None
    bias,  # in [G, O], dense, or None
    out_group_stride,
    out_stride,
    inputs_group_stride,
    inputs_stride,
    states_group_stride,
    states_stride,
    num_rows,
    num_outputs,
    size,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_EVEN: tl.constexpr,  # whether BLOCK_SIZE divides `size`
):
    """Grid: (row blocks * output blocks, G). One program owns a block of a group's outputs.

    Row blocks are neighbours, so that all but the first find their weights in the L2 cache. The
    weight is the product's left operand: few rows of inputs fill a narrow right one.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = block // row_blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_row, is_output = rows < num_rows, outputs < num_outputs
    # Outputs behind the last read the last one's weights: no mask is needed there.
    weight_rows = group * num_outputs + tl.minimum(outputs, num_outputs - 1)
    columns = tl.arange(0, BLOCK_SIZE)
    weights = weight + weight_rows[:, None] * size + columns[None, :]
    sources = inputs + group * inputs_group_stride + rows.to(tl.int64)[None, :] * inputs_stride
    sources += columns[:, None]
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for start in range(0, size, BLOCK_SIZE):
        if IS_EVEN:
            tile = tl.load(weights)
            values = tl.load(sources, mask=is_row[None, :], other=0.0)
        else:
            is_column = columns < size - start
            tile = tl.load(weights, mask=is_column[None, :], other=0.0)
            values = tl.load(sources, mask=is_column[:, None] & is_row[None, :], other=0.0)
        # By float32: straight to bfloat16 Triton converts at a quarter of the rate.
        tile = tile.to(tl.float32).to(values.dtype)
        total = tl.dot(tile, values, total, input_precision="ieee")
        weights += BLOCK_SIZE
        sources += BLOCK_SIZE
    total *= tl.load(scale + weight_rows)[:, None]
    if bias is not None:
        total += tl.load(bias + weight_rows).to(tl.float32)[:, None]
    is_cell = is_output[:, None] & is_row[None, :]
    if states is not None:
        cells = rows.to(tl.int64)[None, :] * states_stride + outputs[:, None]
        source = states + group * states_group_stride + cells
        total *= tl.sigmoid(total)
        total += tl.load(source, mask=is_cell, other=0.0).to(tl.float32)
    cells = rows.to(tl.int64)[None, :] * out_stride + outputs[:, None]
    tl.store(out + group * out_group_stride + cells, total, mask=is_cell)


def float8_product(
    out: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    states: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> None:
    """``out[g] = inputs[g] @ (weight[g] * scale[g][:, None]).T + bias[g]`` for every group g.

    With `states` it is a whole residual layer (paper, section 2.1.1): SiLU is taken of that sum
    and the states are added.  Inputs stay as they are; a product's sum is float32, scaled
    afterwards, and the result is rounded once.

    Parameters
    ----------
    out : torch.Tensor
        ``[G, N, O]``, dtype of `inputs`, out. A view such as ``[N, G, O]`` transposed will do.
    inputs : torch.Tensor
        ``[G, N, I]`` bfloat16, float16 or float32; or ``[1, N, I]``, the same for all groups.
    weight : torch.Tensor
        ``[G, O, I]`` float8_e4m3fn, contiguous.
    scale : torch.Tensor
        ``[G, O]`` float32, contiguous. What each row of the weight was divided by.
    states : torch.Tensor, optional
        ``[G, N, O]`` or ``[1, N, O]``, dtype of `inputs`; may not be `out`.
    bias : torch.Tensor, optional
        ``[G, O]``, dtype of `inputs`, contiguous.
    plan : Plan, optional
        Of the launch, to measure others than :func:`plan_for` chooses.

    Examples
    --------
    Inputs ``[[[1, 2]]]``, weight ``[[[3, 4]]]`` and scale ``[[0.5]]``: out is ``[[[5.5]]]``; with
    states ``[[[1]]]`` and bias ``[[-5.5]]`` it is ``[[[1]]]``.
    """
    check_float8_product(out, inputs, weight, scale, states, bias)
    check_runnable("inputs", inputs, _float8_product_kernel)
    (num_groups, num_outputs, size), num_rows = weight.shape, inputs.shape[1]
    if out.numel() == 0:
        return
    plan = plan or plan_for(num_groups * num_outputs, num_rows)
    blocks = triton.cdiv(num_rows, plan.block_rows) * triton.cdiv(num_outputs, plan.block_outputs)
    _float8_product_kernel[(blocks, num_groups)](
        out, inputs, weight, scale, states, bias,
        *_strides(out), *_strides(inputs), *((0, 0) if states is None else _strides(states)),
        num_rows, num_outputs, size,
        BLOCK_OUTPUTS=plan.block_outputs, BLOCK_ROWS=plan.block_rows, BLOCK_SIZE=plan.block_size,
        IS_EVEN=size % plan.block_size == 0,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


def _strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Of a group, 0 where all share one, and of a row."""
    return (tensor.stride(0) if tensor.shape[0] > 1 else 0), tensor.stride(1)
