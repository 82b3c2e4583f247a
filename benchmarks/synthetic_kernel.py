"""Draw which node of each row is right, on the GPU: the kernel of ``synthetic_children``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _mixed(state, word):
    """MurmurHash3's finaliser over one more 32-bit word; both in int64."""
    state = state ^ (word & 0xFFFFFFFF)
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return state ^ (state >> 16)


@triton.jit
def _draw_children_kernel(
    out_tokens,  # out [num_logits] int32
    drawn,  # in-place [num_logits] int64
    tokens,  # in [num_logits] int32 or int64
    positions,  # in [num_logits] int64
    cu_rows,  # in [R+1] int32
    slots,  # in [R] int64
    seeds,  # in [max_num_reqs] int64
    parents,  # in [max_num_reqs, W] int32
    lowest,  # in [W] int64
    highest,  # in [W] int64
    parents_stride,
    NUM_ROWS: tl.constexpr,  # W
    PADDED_ROWS: tl.constexpr,
):
    """Grid: (R,). One program owns one request's rows."""
    req = tl.program_id(0)
    slot = tl.load(slots + req).to(tl.int64)
    start = tl.load(cu_rows + req).to(tl.int64)
    num_rows = tl.load(cu_rows + req + 1).to(tl.int64) - start
    rows = tl.arange(0, PADDED_ROWS)
    there = rows < tl.minimum(num_rows, NUM_ROWS)
    node = (rows > 0) & (rows < tl.where(slot >= 0, tl.minimum(num_rows, NUM_ROWS), 0))
    parent = tl.load(parents + slot * parents_stride + rows, mask=node, other=0).to(tl.int64)
    token = tl.load(tokens + start + rows, mask=there, other=-1).to(tl.int64)
    state = tl.zeros([PADDED_ROWS], tl.int64)
    seed = tl.load(seeds + tl.maximum(slot, 0))
    state = _mixed(state, seed)
    state = _mixed(state, seed >> 32)
    state = _mixed(state, slot)
    state = _mixed(state, tl.load(positions + start + parent, mask=node, other=0))
    state = _mixed(state, tl.load(tokens + start + parent, mask=node, other=0).to(tl.int64))
    low = tl.load(lowest + rows, mask=node, other=0)
    high = tl.load(highest + rows, mask=node, other=0)
    right = node & (token >= 0) & (low <= state) & (state < high)
    # A row has at most one right child, so that no two of these write the same place.
    tl.store(drawn + start + parent, token, mask=right)
    tl.store(out_tokens + start + rows, tl.where(right | (rows == 0), token, -1), mask=there)


def launch(num_reqs: int, parents: torch.Tensor, arguments: tuple[torch.Tensor, ...]) -> None:
    """Launch it on the checked arguments of ``synthetic_children.draw_children``."""
    width = parents.shape[1]
    _draw_children_kernel[(num_reqs,)](
        *arguments, parents.stride(0), NUM_ROWS=width,
        PADDED_ROWS=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
