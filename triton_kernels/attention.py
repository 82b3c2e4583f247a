"""Tree-masked attention over the paged KV cache: kernels and launcher."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from .attention_plan import AttentionPlan, plan_attention, workspace_elements
from .attention_tile import attend_tile, finish_rows, key_tiles, popcount
from .checks import at_least, check_runnable, check_tensor, check_tree_attention

# Rows per program of the joining kernel: 8 x 128 floats are 8 registers a thread.
_JOIN_ROWS = 8


@triton.jit(do_not_specialize=["num_tokens"])
def _tree_attention_kernel(
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
    workspace,  # out, NUM_SPLITS > 1: float32 accumulators, then (maximum, sum) pairs
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
    NUM_SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Grid: (num_reqs * Hkv * ROW_TILES, NUM_SPLITS).

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
    first_key, first_tile, end_tile, per_split = key_tiles(
        seq_len, context, WINDOW, BLOCK_KEYS, NUM_SPLITS, MIN_TILES
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

    if NUM_SPLITS == 1:
        result = finish_rows(acc, row_max, row_sum, sinks, v_scale, heads, kv_head, SCALES)
        out_ptrs = out + tokens[:, None] * out_stride + heads[:, None] * HEAD_SIZE + dims[None, :]
        tl.store(out_ptrs, result.to(out.dtype.element_ty), mask=is_stored)
    else:
        num_pairs = tl.cast(num_tokens, tl.int64) * (NUM_KV_HEADS * GROUP)
        pair = tl.program_id(1) * num_pairs + tokens * (NUM_KV_HEADS * GROUP) + heads
        acc_ptrs = workspace + pair[:, None] * PADDED_HEAD + dims[None, :]
        tl.store(acc_ptrs, acc, mask=is_row[:, None])
        stats = workspace + NUM_SPLITS * num_pairs * PADDED_HEAD
        tl.store(stats + 2 * pair, row_max, mask=is_row)
        tl.store(stats + 2 * pair + 1, row_sum, mask=is_row)


@triton.jit(do_not_specialize=["num_tokens"])
def _join_splits_kernel(
    out,  # out [num_tokens, Hq, HEAD_SIZE]
    workspace,  # in, as written by _tree_attention_kernel
    query_start_loc,  # in [>= num_reqs + 1] int32
    seq_lens,  # in [>= num_reqs] int32
    sinks,  # in [Hq] or None
    v_scale,  # in [SCALES] float32 or None
    num_tokens,
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
    NUM_SPLITS: tl.constexpr,
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
        seq_len, seq_len - query_len, WINDOW, BLOCK_KEYS, NUM_SPLITS, MIN_TILES
    )
    pairs = first_row + tl.arange(0, BLOCK_ROWS)
    rows = pairs // GROUP
    heads = kv_head * GROUP + pairs % GROUP
    dims = tl.arange(0, PADDED_HEAD)
    is_row = rows < query_len
    tokens = (start + rows).to(tl.int64)
    num_pairs = tl.cast(num_tokens, tl.int64) * (NUM_KV_HEADS * GROUP)
    stats = workspace + NUM_SPLITS * num_pairs * PADDED_HEAD

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


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # the interpreter plans for an H100
    return torch.cuda.get_device_properties(device).multi_processor_count


def tree_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_masks: torch.Tensor,
    *,
    scale: float,
    num_reqs: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int = 0,
    logit_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    num_splits: int | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Attention of tree rows: each sees the whole context and its own ancestors.

    Row i of a request sits at key position ``context + i`` of its pages, already written.
    All sizes are read from device memory; host integers only choose launch shapes, so a call
    can be captured in a CUDA graph with upper bounds.

    Parameters
    ----------
    out, q : torch.Tensor
        ``[num_tokens, Hq, D]`` bfloat16, float16 or float32, heads dense.  float32 is
        computed in float32 (no TF32).
    k_cache, v_cache : torch.Tensor
        ``[num_blocks, block_size, Hkv, D]`` views of equal strides, of q's dtype or
        float8_e4m3fn / float8_e5m2.
    block_table : torch.Tensor
        ``[>= num_reqs, max_blocks]`` int32.
    query_start_loc, seq_lens : torch.Tensor
        ``[>= num_reqs + 1]`` and ``[>= num_reqs]`` int32; a sequence length counts context and
        query rows.  Requests without rows are skipped.
    tree_masks : torch.Tensor
        ``[>= num_reqs, W]`` int64, W >= max_query_len.  Bit j of word i: row i sees row j.
    scale : float
        Softmax scale, positive.
    num_reqs, max_query_len, max_seq_len : int
        Upper bounds of the launch; max_query_len <= 64.
    sliding_window : int
        0 or the number of tree positions a row sees, itself included; a row's position is
        ``context + depth`` with depth = popcount(mask) - 1.
    logit_soft_cap : float
        0 or c in ``c * tanh(score / c)``.
    sinks : torch.Tensor, optional
        ``[Hq]`` logits that take part in the softmax without a value.
    k_scale, v_scale : torch.Tensor, optional
        ``[]``, ``[1]`` or ``[Hkv]`` float32 factors of the cached keys and values.
    num_splits : int, optional
        KV ranges computed in parallel; default from the host integers and the device.
    workspace : torch.Tensor, optional
        float32, dense, at least ``workspace_elements(...)``; allocated when missing.

    Examples
    --------
    Context of 100 keys and rows root, a, b (both under the root): masks ``0b1 0b11 0b101``,
    seq_lens ``103``; row b sees keys 0..99, 100 and 102.
    """
    check_tree_attention(
        out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, scale=scale,
        num_reqs=num_reqs, max_query_len=max_query_len, max_seq_len=max_seq_len,
        sliding_window=sliding_window, logit_soft_cap=logit_soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    check_runnable("q", q, _tree_attention_kernel)
    num_tokens, num_heads, head_size = q.shape
    if num_reqs == 0 or num_tokens == 0:
        return
    num_kv_heads = k_cache.shape[2]
    plan = plan_attention(
        num_reqs=num_reqs, num_kv_heads=num_kv_heads, group=num_heads // num_kv_heads,
        head_size=head_size, item_size=q.element_size(), max_query_len=max_query_len,
        max_seq_len=max_seq_len, num_multiprocessors=_num_multiprocessors(q.device),
        num_splits=num_splits,
    )  # fmt: skip
    needed = workspace_elements(num_tokens, num_heads, head_size, plan.num_splits)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
    else:
        check_tensor(
            "workspace", workspace, shape=[at_least(needed)], dtype=torch.float32, device=q.device
        )
    launch(
        plan, out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, scale,
        num_reqs, max_query_len, sliding_window, logit_soft_cap, sinks, k_scale, v_scale, workspace,
    )  # fmt: skip


def launch(
    plan: AttentionPlan,
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_masks: torch.Tensor,
    scale: float,
    num_reqs: int,
    max_query_len: int,
    sliding_window: int,
    logit_soft_cap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    workspace: torch.Tensor,
) -> None:
    """Run a plan on checked arguments (also the tuner's way in)."""
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    shape = {
        "WINDOW": sliding_window, "NUM_KV_HEADS": num_kv_heads, "GROUP": group,
        "HEAD_SIZE": head_size, "PADDED_HEAD": triton.next_power_of_2(head_size),
        "BLOCK_KEYS": plan.block_keys, "NUM_SPLITS": plan.num_splits, "MIN_TILES": plan.min_tiles,
    }  # fmt: skip
    scales = {s.numel() for s in (k_scale, v_scale) if s is not None} or {1}
    _tree_attention_kernel[(num_reqs * num_kv_heads * plan.row_tiles, plan.num_splits)](
        out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, sinks,
        k_scale, v_scale, workspace, num_tokens, out.stride(0), q.stride(0), k_cache.stride(0),
        k_cache.stride(1), k_cache.stride(2), block_table.stride(0), tree_masks.stride(0),
        **shape, SCALE=scale, SOFT_CAP=logit_soft_cap, SCALES=max(scales),
        BLOCK_SIZE=k_cache.shape[1], BLOCK_ROWS=plan.block_rows, ROW_TILES=plan.row_tiles,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    if plan.num_splits == 1:
        return
    row_tiles = triton.cdiv(max_query_len * group, _JOIN_ROWS)
    _join_splits_kernel[(num_reqs * num_kv_heads * row_tiles,)](
        out, workspace, query_start_loc, seq_lens, sinks, v_scale, num_tokens, out.stride(0),
        **shape, SCALES=max(scales), BLOCK_ROWS=_JOIN_ROWS, ROW_TILES=row_tiles, num_warps=4,
    )  # fmt: skip
