"""The few smallest of many numbers, as kernels of one program per selection need them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def descending(keys):
    """int32 -> uint32 in the opposite order."""
    return (keys ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)


@triton.jit
def smallest(
    costs,  # [SIZE] uint32, SIZE at most 16384
    scratch,  # scratch [num_wanted] int32
    num_wanted,  # at most SIZE
    SIZE: tl.constexpr,
    PADDED_WANTED: tl.constexpr,
):
    """[PADDED_WANTED] int32: places of the smallest in ascending order, -2 behind them.

    Of equal costs the lower places.
    """
    # Bit by bit, until as many lie below as are wanted (some 15 of 32 steps later) or the limit
    # is the cost of the last one, which others may share.
    limit = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    while bit > 0:
        trial = limit | bit
        num_below = tl.sum((costs < trial).to(tl.int32), 0)
        limit = tl.where(num_below <= num_wanted, trial, limit)
        bit = tl.where(num_below == num_wanted, 0, bit >> 1).to(tl.uint32)
    is_below = costs < limit
    is_equal = costs == limit
    # Two counts in one scan: below in the low half, equal in the high half.
    counts = tl.cumsum(is_below.to(tl.int32) + (is_equal.to(tl.int32) << 16), 0)
    num_open = num_wanted - tl.sum(is_below.to(tl.int32), 0)
    num_equal = counts >> 16
    target = (counts & 0xFFFF) + tl.minimum(num_equal, num_open) - 1
    is_chosen = is_below | (is_equal & (num_equal <= num_open))
    tl.store(scratch + target, tl.arange(0, SIZE), mask=is_chosen)
    tl.debug_barrier()
    wanted = tl.arange(0, PADDED_WANTED)
    return tl.load(scratch + wanted, mask=wanted < num_wanted, other=-2, cache_modifier=".cg")


@triton.jit
def ranks_of(
    costs,  # [SIZE] uint32
    SIZE: tl.constexpr,
):
    """[SIZE] int32: how many are smaller, or equal and before."""
    places = tl.arange(0, SIZE)
    is_before = (costs[None, :] < costs[:, None]) | (
        (costs[None, :] == costs[:, None]) & (places[None, :] < places[:, None])
    )
    return tl.sum(is_before.to(tl.int32), 1)
