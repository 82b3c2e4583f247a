"""The two kernels of tree attention: all keys, or those of the tree alone."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention_join import join_tile
from .attention_tile import (
    LOG2_E,
    attend_tile,
    finish_rows,
    key_pages,
    key_tiles,
    program_rows,
    row_masks,
    split_pairs,
)


@triton.jit(do_not_specialize=["num_tokens"])
def tree_attention_kernel(
    out,  # out [num_tokens, Hq, HEAD_SIZE]
    q,  # in [num_tokens, Hq, HEAD_SIZE]
    k_cache,  # in [num_blocks, BLOCK_SIZE, Hkv, HEAD_SIZE], strided
    v_cache,  # in, strides of k_cache
    block_table,  # in [>= num_reqs, max_blocks] int32
    query_start_loc,  # in [>= num_reqs + 1] int32
    seq_lens,  # in [>= num_reqs] int32
    tree_masks,  # in [>= num_reqs, W] int64, or [>= num_reqs, 2, W]
    sinks,  # in [Hq] or None
    k_scale,  # in [SCALES] float32 or None
    v_scale,  # in [SCALES] float32 or None
    q_scale,  # in [SCALES] float32 or None
    workspace,  # out, IS_SPLIT: float32 accumulators, then (maximum, sum) pairs
    counters,  # in-place, LAST_JOINS: [row_tiles * num_reqs * Hkv] int32, 0 on entry and return
    num_tokens,
    out_stride,
    q_stride,
    table_stride,
    masks_stride,
    BLOCK_STRIDE: tl.constexpr,  # of the cache, in elements
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SECOND_WORD: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    LAST_JOINS: tl.constexpr,
    CHAINED: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Grid: (row_tiles, num_reqs * Hkv, num_splits).

    One program owns BLOCK_ROWS (query row, head of the group) pairs of one request and KV
    head, over one range of keys: all query heads of a KV head share the pass over it.
    If LAST_JOINS, the program that ends last of a tile's splits joins them; else a kernel that
    follows does, whose programs are on their way meanwhile if CHAINED.
    """
    if CHAINED:
        gdc_launch_dependents()
    kv_head, req, start, query_len, seq_len, first_pair = program_rows(
        query_start_loc, seq_lens, NUM_KV_HEADS, BLOCK_ROWS
    )
    if first_pair >= query_len * GROUP:
        return
    context = seq_len - query_len
    # The number of splits depends on the batch; read off the grid it needs no recompilation.
    num_splits = tl.num_programs(2)
    first_key, first_tile, end_tile, per_split = key_tiles(
        seq_len, context, num_splits, WINDOW, BLOCK_KEYS, MIN_TILES
    )
    low = first_tile + tl.program_id(2) * per_split
    high = tl.minimum(low + per_split, end_tile)
    if low >= high:
        return

    rows, heads, is_row, tokens = split_pairs(
        first_pair, start, query_len, kv_head, GROUP, BLOCK_ROWS
    )
    dims = tl.arange(0, PADDED_HEAD)
    is_stored = is_row[:, None] & (dims < HEAD_SIZE)[None, :]
    q_ptrs = q + tokens[:, None] * q_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
    # float8 queries are exact in the output's dtype, in which the products are made.
    q_tile = tl.load(q_ptrs, mask=is_stored, other=0.0).to(out.dtype.element_ty)
    masks_row = tree_masks + req.to(tl.int64) * masks_stride
    words, high_words, depths = row_masks(masks_row, rows, is_row, WINDOW, SECOND_WORD)
    qk_scale = SCALE
    if k_scale is not None:
        qk_scale = SCALE * tl.load(k_scale + kv_head % SCALES)
    if q_scale is not None:
        qk_scale = qk_scale * tl.load(q_scale + kv_head % SCALES)
    k_head = k_cache + kv_head.to(tl.int64) * HEAD_STRIDE
    v_head = v_cache + kv_head.to(tl.int64) * HEAD_STRIDE
    table_row = block_table + req.to(tl.int64) * table_stride

    acc = tl.zeros([BLOCK_ROWS, PADDED_HEAD], tl.float32)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    # A tile's pages are known one turn ahead: loads that wait for another load of their own turn
    # are issued a turn later, and every tile would wait for its keys.
    in_one_page: tl.constexpr = BLOCK_SIZE % BLOCK_KEYS == 0
    pages = key_pages(
        table_row, low * BLOCK_KEYS, first_key, seq_len, WINDOW, BLOCK_SIZE, BLOCK_KEYS, in_one_page
    )
    for tile in range(low, high):
        next_pages = key_pages(
            table_row, (tile + 1) * BLOCK_KEYS, first_key, seq_len, WINDOW, BLOCK_SIZE,
            BLOCK_KEYS, in_one_page,
        )  # fmt: skip
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q_tile, words, high_words, depths, tile * BLOCK_KEYS, pages,
            k_head, v_head, masks_row, first_key, context, seq_len, qk_scale, BLOCK_STRIDE,
            SLOT_STRIDE, V_OFFSET, SOFT_CAP, WINDOW, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE,
            BLOCK_KEYS, SECOND_WORD,
        )  # fmt: skip
        pages = next_pages

    if not IS_SPLIT:
        result = finish_rows(acc, row_max, row_sum, sinks, v_scale, heads, kv_head, SCALES)
        out_ptrs = out + tokens[:, None] * out_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
        tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_stored)
    else:
        num_pairs = tl.cast(num_tokens, tl.int64) * (NUM_KV_HEADS * GROUP)
        pair = tl.program_id(2) * num_pairs + tokens * (NUM_KV_HEADS * GROUP) + heads
        acc_ptrs = workspace + pair[:, None] * PADDED_HEAD + dims[None, :]
        tl.store(acc_ptrs, acc, mask=is_row[:, None])
        stats = workspace + num_splits * num_pairs * PADDED_HEAD
        tl.store(stats + 2 * pair, row_max, mask=is_row)
        tl.store(stats + 2 * pair + 1, row_sum, mask=is_row)
        if LAST_JOINS:
            # All threads' results are written before one thread announces them; acquire and
            # release order them with the reads of the program that comes last.
            tl.debug_barrier()
            counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            num_used = tl.cdiv(end_tile - first_tile, per_split)
            if tl.atomic_add(counter, 1, sem="acq_rel") + 1 < num_used:
                return
            tl.store(counter, 0)
            first = tokens * (NUM_KV_HEADS * GROUP) + heads
            acc, row_max, row_sum = join_tile(
                workspace, stats, first, num_pairs, num_used, is_row, PADDED_HEAD, 2
            )
            result = finish_rows(acc, row_max, row_sum, sinks, v_scale, heads, kv_head, SCALES)
            out_ptrs = out + tokens[:, None] * out_stride
            out_ptrs += heads[:, None] * HEAD_SIZE + dims[None, :]
            tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_stored)


@triton.jit
def tree_part_kernel(
    out,  # in and out [num_tokens, Hq, HEAD_SIZE], attention over the context
    lse,  # in [Hq, num_tokens] float32, its log-sum-exp
    q,  # in [num_tokens, Hq, HEAD_SIZE]
    k_cache,  # in [num_blocks, BLOCK_SIZE, Hkv, HEAD_SIZE], strided
    v_cache,  # in, strides of k_cache
    block_table,  # in [>= num_reqs, max_blocks] int32
    query_start_loc,  # in [>= num_reqs + 1] int32
    seq_lens,  # in [>= num_reqs] int32
    tree_masks,  # in [>= num_reqs, W] int64, or [>= num_reqs, 2, W]
    sinks,  # in [Hq] or None
    k_scale,  # in [SCALES] float32 or None
    v_scale,  # in [SCALES] float32 or None
    q_scale,  # in [SCALES] float32 or None
    out_stride,
    lse_stride,
    q_stride,
    table_stride,
    masks_stride,
    BLOCK_STRIDE: tl.constexpr,  # of the cache, in elements
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SECOND_WORD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Grid: (row_tiles, num_reqs * Hkv). Keys of the tree, joined with the context's part."""
    kv_head, req, start, query_len, seq_len, first_pair = program_rows(
        query_start_loc, seq_lens, NUM_KV_HEADS, BLOCK_ROWS
    )
    if first_pair >= query_len * GROUP:
        return
    context = seq_len - query_len
    rows, heads, is_row, tokens = split_pairs(
        first_pair, start, query_len, kv_head, GROUP, BLOCK_ROWS
    )
    dims = tl.arange(0, PADDED_HEAD)
    is_stored = is_row[:, None] & (dims < HEAD_SIZE)[None, :]
    head_offsets = heads[:, None] * HEAD_SIZE + dims[None, :]
    if CHAINED:
        gdc_wait()
    q_ptrs = q + tokens[:, None] * q_stride + head_offsets
    q_tile = tl.load(q_ptrs, mask=is_stored, other=0.0).to(out.dtype.element_ty)
    qk_scale = SCALE
    if k_scale is not None:
        qk_scale = SCALE * tl.load(k_scale + kv_head % SCALES)
    if q_scale is not None:
        qk_scale = qk_scale * tl.load(q_scale + kv_head % SCALES)
    masks_row = tree_masks + req.to(tl.int64) * masks_stride
    words, high_words, depths = row_masks(masks_row, rows, is_row, 0, SECOND_WORD)
    k_head = k_cache + kv_head.to(tl.int64) * HEAD_STRIDE
    v_head = v_cache + kv_head.to(tl.int64) * HEAD_STRIDE
    table_row = block_table + req.to(tl.int64) * table_stride
    row_lse = tl.load(lse + heads * lse_stride + tokens, mask=is_row, other=float("-inf"))
    context_out = tl.load(out + tokens[:, None] * out_stride + head_offsets, mask=is_stored)

    acc = tl.zeros([BLOCK_ROWS, PADDED_HEAD], tl.float32)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    for low in range(context, seq_len, BLOCK_KEYS):
        pages = key_pages(table_row, low, context, seq_len, 0, BLOCK_SIZE, BLOCK_KEYS, False)
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q_tile, words, high_words, depths, low, pages, k_head, v_head,
            masks_row, context, context, seq_len, qk_scale, BLOCK_STRIDE, SLOT_STRIDE, V_OFFSET,
            SOFT_CAP, 0, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, BLOCK_KEYS, SECOND_WORD,
        )  # fmt: skip
    if v_scale is not None:  # the context's part has been multiplied already
        acc = acc * tl.load(v_scale + kv_head % SCALES)
    # Nothing can be said of rows without a context: FlashAttention leaves +inf or -inf there.
    row_lse = tl.where(context > 0, row_lse * LOG2_E, float("-inf"))
    new_max = tl.maximum(row_max, row_lse)
    ours, theirs = tl.exp2(row_max - new_max), tl.exp2(row_lse - new_max)
    context_out = tl.where(context > 0, context_out.to(tl.float32), 0.0)
    acc = acc * ours[:, None] + context_out * theirs[:, None]
    row_sum = row_sum * ours + theirs
    result = finish_rows(acc, new_max, row_sum, sinks, None, heads, kv_head, 1)
    tl.store(
        out + tokens[:, None] * out_stride + head_offsets,
        result.to(out.dtype.element_ty),
        mask=is_stored,
    )
