"""The two kernels of tree attention: ranges of keys, and the joining of their results."""

import triton
import triton.language as tl

from .attention_tile import attend_tile, finish_rows, key_tiles, popcount


@triton.jit(do_not_specialize=["num_tokens"])
def tree_attention_kernel(
    out,  # out [num_tokens, Hq, HEAD_SIZE]
    q,  # in [num_tokens, Hq, HEAD_SIZE]
    k_cache,  # in [num_blocks, BLOCK_SIZE, Hkv, HEAD_SIZE], strided
    v_cache,  # in, strides of k_cache
    block_table,  # in [>= num_reqs, max_blocks] int32
    query_start_loc,  # in [>= num_reqs + 1] int32
    seq_lens,  # in [>= num_reqs] int32
    tree_masks,  # in [>= num_reqs, W] int64
    sinks,  # in [Hq] or None
    k_scale,  # in [SCALES] float32 or None
    v_scale,  # in [SCALES] float32 or None
    workspace,  # out, IS_SPLIT: float32 accumulators, then (maximum, sum) pairs
    num_tokens,
    out_stride,
    q_stride,
    block_stride,
    slot_stride,
    head_stride,
    table_stride,
    masks_stride,
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
    ROW_TILES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Grid: (num_reqs * Hkv * ROW_TILES, num_splits).

    One program owns BLOCK_ROWS (query row, head of the group) pairs of one request and KV
    head, over one range of keys: all query heads of a KV head share the pass over it.
    """
    pid = tl.program_id(0)
    kv_head = pid // ROW_TILES % NUM_KV_HEADS
    req = pid // (ROW_TILES * NUM_KV_HEADS)
    start = tl.load(query_start_loc + req)
    query_len = tl.load(query_start_loc + req + 1) - start
    first_row = pid % ROW_TILES * BLOCK_ROWS
    if first_row >= query_len * GROUP:
        return
    seq_len = tl.load(seq_lens + req)
    context = seq_len - query_len
    # The number of splits depends on the batch; read off the grid it needs no recompilation.
    num_splits = tl.num_programs(1)
    first_key, first_tile, end_tile, per_split = key_tiles(
        seq_len, context, num_splits, WINDOW, BLOCK_KEYS, MIN_TILES
    )
    low = first_tile + tl.program_id(1) * per_split
    high = tl.minimum(low + per_split, end_tile)
    if low >= high:
        return

    pairs = first_row + tl.arange(0, BLOCK_ROWS)
    rows = pairs // GROUP
    heads = kv_head * GROUP + pairs % GROUP
    dims = tl.arange(0, PADDED_HEAD)
    is_row = rows < query_len
    is_stored = is_row[:, None] & (dims < HEAD_SIZE)[None, :]
    tokens = (start + rows).to(tl.int64)
    q_ptrs = q + tokens[:, None] * q_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
    q_tile = tl.load(q_ptrs, mask=is_stored, other=0.0)
    masks_row = tree_masks + req.to(tl.int64) * masks_stride
    words = tl.load(masks_row + rows, mask=is_row, other=1)
    depths = tl.zeros([BLOCK_ROWS], tl.int32)
    if WINDOW > 0:
        depths = popcount(words) - 1
    qk_scale = SCALE
    if k_scale is not None:
        qk_scale = SCALE * tl.load(k_scale + kv_head % SCALES)
    k_head = k_cache + kv_head.to(tl.int64) * head_stride
    v_head = v_cache + kv_head.to(tl.int64) * head_stride
    table_row = block_table + req.to(tl.int64) * table_stride

    acc = tl.zeros([BLOCK_ROWS, PADDED_HEAD], tl.float32)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    full_tiles = context // BLOCK_KEYS  # tiles without a tree key
    for tile in range(low, tl.minimum(high, full_tiles)):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q_tile, words, depths, tile, k_head, v_head, table_row,
            masks_row, first_key, context, seq_len, qk_scale, block_stride, slot_stride, False,
            SOFT_CAP, WINDOW, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, BLOCK_KEYS,
        )  # fmt: skip
    for tile in range(tl.maximum(low, full_tiles), high):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q_tile, words, depths, tile, k_head, v_head, table_row,
            masks_row, first_key, context, seq_len, qk_scale, block_stride, slot_stride, True,
            SOFT_CAP, WINDOW, HEAD_SIZE, PADDED_HEAD, BLOCK_SIZE, BLOCK_KEYS,
        )  # fmt: skip

    if not IS_SPLIT:
        result = finish_rows(acc, row_max, row_sum, sinks, v_scale, heads, kv_head, SCALES)
        out_ptrs = out + tokens[:, None] * out_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
        tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_stored)
    else:
        num_pairs = tl.cast(num_tokens, tl.int64) * (NUM_KV_HEADS * GROUP)
        pair = tl.program_id(1) * num_pairs + tokens * (NUM_KV_HEADS * GROUP) + heads
        acc_ptrs = workspace + pair[:, None] * PADDED_HEAD + dims[None, :]
        tl.store(acc_ptrs, acc, mask=is_row[:, None])
        stats = workspace + num_splits * num_pairs * PADDED_HEAD
        tl.store(stats + 2 * pair, row_max, mask=is_row)
        tl.store(stats + 2 * pair + 1, row_sum, mask=is_row)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def join_splits_kernel(
    out,  # out [num_tokens, Hq, HEAD_SIZE]
    workspace,  # in, as written by tree_attention_kernel
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Grid: (num_reqs * Hkv * ROW_TILES,). One program joins the splits of BLOCK_ROWS pairs."""
    pid = tl.program_id(0)
    kv_head = pid // ROW_TILES % NUM_KV_HEADS
    req = pid // (ROW_TILES * NUM_KV_HEADS)
    start = tl.load(query_start_loc + req)
    query_len = tl.load(query_start_loc + req + 1) - start
    first_row = pid % ROW_TILES * BLOCK_ROWS
    if first_row >= query_len * GROUP:
        return
    seq_len = tl.load(seq_lens + req)
    _, first_tile, end_tile, per_split = key_tiles(
        seq_len, seq_len - query_len, num_splits, WINDOW, BLOCK_KEYS, MIN_TILES
    )
    pairs = first_row + tl.arange(0, BLOCK_ROWS)
    rows = pairs // GROUP
    heads = kv_head * GROUP + pairs % GROUP
    dims = tl.arange(0, PADDED_HEAD)
    is_row = rows < query_len
    tokens = (start + rows).to(tl.int64)
    num_pairs = tl.cast(num_tokens, tl.int64) * (NUM_KV_HEADS * GROUP)
    stats = workspace + num_splits * num_pairs * PADDED_HEAD

    acc = tl.zeros([BLOCK_ROWS, PADDED_HEAD], tl.float32)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    for split in range(0, tl.cdiv(end_tile - first_tile, per_split)):
        pair = split * num_pairs + tokens * (NUM_KV_HEADS * GROUP) + heads
        acc_ptrs = workspace + pair[:, None] * PADDED_HEAD + dims[None, :]
        split_acc = tl.load(acc_ptrs, mask=is_row[:, None], other=0.0)
        split_max = tl.load(stats + 2 * pair, mask=is_row, other=float("-inf"))
        split_sum = tl.load(stats + 2 * pair + 1, mask=is_row, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        old, new = tl.exp2(row_max - anchor), tl.exp2(split_max - anchor)
        acc = acc * old[:, None] + split_acc * new[:, None]
        row_sum = row_sum * old + split_sum * new
        row_max = new_max
    result = finish_rows(acc, row_max, row_sum, sinks, v_scale, heads, kv_head, SCALES)
    out_ptrs = out + tokens[:, None] * out_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
    is_stored = is_row[:, None] & (dims < HEAD_SIZE)[None, :]
    tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_stored)
