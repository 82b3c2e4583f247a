"""Plain PyTorch twin of tree attention; needs no Triton."""

from __future__ import annotations

import torch

from .checks import WORD_BITS, check_tree_attention


def _ancestors(masks: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A request's masks ``[W]`` or ``[2, W]`` -> ``[num_rows, num_rows]`` bool: who sees whom."""
    rows = torch.arange(num_rows, device=masks.device)
    words = masks.view(-1, masks.shape[-1])[rows // WORD_BITS, :num_rows]  # [seen, seeing]
    return (words.T >> rows % WORD_BITS & 1).bool()


def _visible_keys(
    is_ancestor: torch.Tensor,  # [rows, rows] bool
    context: int,
    window: int,
) -> torch.Tensor:
    """``[rows, context + rows]`` bool: who sees which key."""
    num_rows = is_ancestor.shape[0]
    keys = torch.arange(context, device=is_ancestor.device)
    visible = torch.cat([is_ancestor.new_ones(num_rows, context), is_ancestor], 1)
    if window > 0:
        positions = context + is_ancestor.sum(1) - 1  # of the rows, by depth
        key_positions = torch.cat([keys, positions])
        visible &= positions[:, None] - key_positions[None, :] < window
    return visible


def _gather_rows(
    cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    table_row: torch.Tensor,  # [max_blocks] int32
    keys: torch.Tensor,  # [keys] int64
    factors: torch.Tensor | None,  # [], [1] or [Hkv] float32
    dtype: torch.dtype,
) -> torch.Tensor:
    """``[keys, Hkv, D]`` rows of a paged cache, times their factors."""
    block_size = cache.shape[1]
    # float8 tensors cannot be indexed everywhere, their bytes can
    words = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    rows = words[table_row[keys // block_size].long(), keys % block_size].view(cache.dtype)
    rows = rows.to(dtype)
    return rows if factors is None else rows * factors.reshape(-1, 1)


def _scaled_queries(
    q: torch.Tensor,  # [num_tokens, Hq, D]
    factors: torch.Tensor | None,  # [], [1] or [Hkv] float32
    num_kv_heads: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``[num_tokens, Hq, D]`` queries times the factors of their KV heads."""
    if factors is None:
        return q.to(dtype)
    grouped = q.to(dtype).unflatten(1, (num_kv_heads, -1))
    return (grouped * factors.reshape(-1, 1, 1)).flatten(1, 2)


def _scores(
    q: torch.Tensor,  # [rows, Hq, D]
    k: torch.Tensor,  # [keys, Hkv, D]
    scale: float,
    soft_cap: float,
) -> torch.Tensor:
    """``[rows, Hq, keys]``, before any mask."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("nhgd,shd->nhgs", grouped, k) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return scores.flatten(1, 2)


def _weighted_values(
    weights: torch.Tensor,  # [rows, Hq, keys]
    v: torch.Tensor,  # [keys, Hkv, D]
) -> torch.Tensor:
    """``[rows, Hq, D]``."""
    grouped = weights.unflatten(1, (v.shape[1], -1))
    return torch.einsum("nhgs,shd->nhgd", grouped, v).flatten(1, 2)


def tree_attention(
    out: torch.Tensor,  # [num_tokens, Hq, D]
    q: torch.Tensor,  # [num_tokens, Hq, D]
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    block_table: torch.Tensor,  # [>= num_reqs, max_blocks] int32
    query_start_loc: torch.Tensor,  # [>= num_reqs + 1] int32
    seq_lens: torch.Tensor,  # [>= num_reqs] int32
    tree_masks: torch.Tensor,  # [>= num_reqs, (2,) W] int64
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
    q_scale: torch.Tensor | None = None,
    num_splits: int | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.attention.tree_attention`.

    Computes in float32, or in float64 if `out` is float64 (the tests' ground truth).
    `num_splits` and `workspace` have no meaning here.
    """
    check_tree_attention(
        out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, scale=scale,
        num_reqs=num_reqs, max_query_len=max_query_len, max_seq_len=max_seq_len,
        sliding_window=sliding_window, logit_soft_cap=logit_soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, q_scale=q_scale,
    )  # fmt: skip
    compute = torch.promote_types(out.dtype, torch.float32)
    queries = _scaled_queries(q, q_scale, k_cache.shape[2], compute)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for r in range(num_reqs):
        rows = slice(starts[r], starts[r + 1])
        num_rows = rows.stop - rows.start
        if num_rows == 0:
            continue
        context = lengths[r] - num_rows
        # Pages before the root's window may have been freed and hold anything.
        first_key = max(context - sliding_window + 1, 0) if sliding_window else 0
        keys = torch.arange(first_key, lengths[r], device=q.device)
        k = _gather_rows(k_cache, block_table[r], keys, k_scale, compute)
        v = _gather_rows(v_cache, block_table[r], keys, v_scale, compute)
        scores = _scores(queries[rows], k, scale, logit_soft_cap)
        visible = _visible_keys(_ancestors(tree_masks[r], num_rows), context, sliding_window)
        scores = scores.masked_fill(~visible[:, None, first_key:], float("-inf"))
        if sinks is not None:
            sink_column = sinks.to(compute)[None, :, None].expand(num_rows, -1, 1)
            scores = torch.cat([scores, sink_column], 2)
        weights = torch.softmax(scores, 2)[:, :, : len(keys)]
        out[rows] = _weighted_values(weights, v).to(out.dtype)


def add_tree_attention(
    out: torch.Tensor,  # [num_tokens, Hq, D], attention over the context
    lse: torch.Tensor,  # [Hq, num_tokens] float32, its log-sum-exp
    q: torch.Tensor,  # [num_tokens, Hq, D]
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    block_table: torch.Tensor,  # [>= num_reqs, max_blocks] int32
    query_start_loc: torch.Tensor,  # [>= num_reqs + 1] int32
    seq_lens: torch.Tensor,  # [>= num_reqs] int32
    tree_masks: torch.Tensor,  # [>= num_reqs, (2,) W] int64
    *,
    scale: float,
    num_reqs: int,
    max_query_len: int,
    max_seq_len: int,
    logit_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.attention.add_tree_attention`."""
    check_tree_attention(
        out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, scale=scale,
        num_reqs=num_reqs, max_query_len=max_query_len, max_seq_len=max_seq_len,
        sliding_window=0, logit_soft_cap=logit_soft_cap, sinks=sinks, k_scale=k_scale,
        v_scale=v_scale, q_scale=q_scale,
    )  # fmt: skip
    compute = torch.promote_types(out.dtype, torch.float32)
    queries = _scaled_queries(q, q_scale, k_cache.shape[2], compute)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for r in range(num_reqs):
        rows = slice(starts[r], starts[r + 1])
        num_rows = rows.stop - rows.start
        if num_rows == 0:
            continue
        context = lengths[r] - num_rows
        keys = torch.arange(context, lengths[r], device=q.device)
        k = _gather_rows(k_cache, block_table[r], keys, k_scale, compute)
        v = _gather_rows(v_cache, block_table[r], keys, v_scale, compute)
        scores = _scores(queries[rows], k, scale, logit_soft_cap)
        is_ancestor = _ancestors(tree_masks[r], num_rows)
        scores = scores.masked_fill(~is_ancestor[:, None], float("-inf"))
        parts, context_lse = [scores], lse[:, rows].T.to(compute)
        context_out = out[rows].to(compute)
        if context == 0:
            context_lse = torch.full_like(context_lse, float("-inf"))
            context_out = torch.zeros_like(context_out)
        parts.append(context_lse[..., None])
        if sinks is not None:
            parts.append(sinks.to(compute)[None, :, None].expand(num_rows, -1, 1))
        weights = torch.softmax(torch.cat(parts, 2), 2)
        result = _weighted_values(weights[..., :num_rows], v)
        out[rows] = (result + weights[..., num_rows, None] * context_out).to(out.dtype)
