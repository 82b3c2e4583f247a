"""Results of splits become one: by the last program of a tile, or by a kernel of its own."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .attention_tile import finish_rows, key_tiles, program_rows, split_pairs


@triton.jit
def join_tile(
    workspace,  # [num_splits, num_pairs, PADDED_HEAD] float32, other programs' accumulators
    stats,  # [num_splits, num_pairs, 2] float32, their maxima and sums
    pairs,  # [rows] int64
    num_pairs,
    num_used,  # splits that hold results
    is_row,  # [rows]
    PADDED_HEAD: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
):
    """Accumulator, maximum and sum over all splits of a tile's pairs.

    In the order of the splits, whichever program ended last: equal bits in every run.  One
    split is folded in after the other, but IN_FLIGHT of them are loaded at once.
    """
    acc = tl.zeros([pairs.shape[0], PADDED_HEAD], tl.float32)
    row_max = tl.full(pairs.shape, float("-inf"), tl.float32)
    row_sum = tl.zeros(pairs.shape, tl.float32)
    dims = tl.arange(0, PADDED_HEAD)
    for first in tl.range(0, num_used, IN_FLIGHT):
        for turn in tl.static_range(IN_FLIGHT):
            places = tl.cast(first + turn, tl.int64) * num_pairs + pairs
            is_used = is_row & (places < num_used * num_pairs)
            # Other multiprocessors wrote them: read them where they all meet, in L2.
            part = tl.load(
                workspace + places[:, None] * PADDED_HEAD + dims[None, :], mask=is_used[:, None],
                other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            part_max = tl.load(
                stats + 2 * places, mask=is_used, other=float("-inf"), cache_modifier=".cg"
            )
            part_sum = tl.load(
                stats + 2 * places + 1, mask=is_used, other=0.0, cache_modifier=".cg"
            )
            new_max = tl.maximum(row_max, part_max)
            # A row that no split saw anything for has maximum -inf; -inf - -inf would be NaN.
            anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
            before, now = tl.exp2(row_max - anchor), tl.exp2(part_max - anchor)
            acc = acc * before[:, None] + part * now[:, None]
            row_sum = row_sum * before + part_sum * now
            row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def join_splits_kernel(
    out,  # out [num_tokens, Hq, HEAD_SIZE]
    workspace,  # in, float32 accumulators, then (maximum, sum) pairs
    query_start_loc,  # in [>= num_reqs + 1] int32
    seq_lens,  # in [>= num_reqs] int32
    sinks,  # in [Hq] or None
    v_scale,  # in [SCALES] float32 or None
    num_tokens,
    num_splits,
    out_stride,
    WINDOW: tl.constexpr,
    SCALES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    JOIN_ROWS: tl.constexpr,
    IN_FLIGHT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: (tiles of JOIN_ROWS pairs, num_reqs * Hkv). What the splits of a tile have left.

    Tiles are smaller than those of attention, so that all multiprocessors take part.
    """
    kv_head, _, start, query_len, seq_len, first_pair = program_rows(
        query_start_loc, seq_lens, NUM_KV_HEADS, JOIN_ROWS
    )
    if first_pair >= query_len * GROUP:
        return
    _, first_tile, end_tile, per_split = key_tiles(
        seq_len, seq_len - query_len, num_splits, WINDOW, BLOCK_KEYS, MIN_TILES
    )
    _, heads, is_row, tokens = split_pairs(first_pair, start, query_len, kv_head, GROUP, JOIN_ROWS)
    num_pairs = tl.cast(num_tokens, tl.int64) * (NUM_KV_HEADS * GROUP)
    if CHAINED:
        gdc_wait()
    acc, row_max, row_sum = join_tile(
        workspace, workspace + num_splits * num_pairs * PADDED_HEAD,
        tokens * (NUM_KV_HEADS * GROUP) + heads, num_pairs,
        tl.cdiv(end_tile - first_tile, per_split), is_row, PADDED_HEAD, IN_FLIGHT,
    )  # fmt: skip
    result = finish_rows(acc, row_max, row_sum, sinks, v_scale, heads, kv_head, SCALES)
    dims = tl.arange(0, PADDED_HEAD)
    out_ptrs = out + tokens[:, None] * out_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
    is_stored = is_row[:, None] & (dims < HEAD_SIZE)[None, :]
    tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_stored)
