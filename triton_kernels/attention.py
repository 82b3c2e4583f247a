"""Tree-masked attention over the paged KV cache: the launcher."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache

import torch

from .attention_join import join_splits_kernel
from .attention_kernels import tree_attention_kernel, tree_part_kernel
from .attention_plan import (
    MOST_COUNTERS,
    AttentionPlan,
    ceil_div,
    plan_attention,
    power_of_two_from,
    workspace_elements,
)
from .checks import (
    WORD_BITS,
    at_least,
    check_runnable,
    check_tensor,
    check_tree_attention,
    require,
)
from .repeated_launch import RepeatedLaunch

_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


@cache
def can_chain(device: torch.device) -> bool:
    """Whether a kernel may start before its predecessor ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of `device`; what a plan is made for."""
    if device.type != "cuda":
        return 132  # the interpreter plans for an H100
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cache_layout(k_cache: torch.Tensor, v_cache: torch.Tensor) -> dict[str, int]:
    """Sizes of a paged cache that are the same for all steps: constants spare 64-bit products.

    Values that lie behind their keys, as in vLLM's layouts, share the keys' addresses.
    """
    offset = 0
    if k_cache.untyped_storage().data_ptr() == v_cache.untyped_storage().data_ptr():
        offset = v_cache.storage_offset() - k_cache.storage_offset()
    return {
        "BLOCK_STRIDE": k_cache.stride(0),
        "SLOT_STRIDE": k_cache.stride(1),
        "HEAD_STRIDE": k_cache.stride(2),
        "BLOCK_SIZE": k_cache.shape[1],
        "V_OFFSET": offset if 0 < offset < k_cache.stride(1) else 0,
    }


def join_counters(device: torch.device, count: int) -> torch.Tensor:
    """[>= count] int32 zeros of the current stream; a call leaves them as it finds them.

    A CUDA graph that is being captured gets its own: it would go on using a shared buffer that
    was replaced, and one made in it is zero only after its own first replay.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    found = _counters.get((device, stream))
    if found is None or len(found) < count:
        found = torch.zeros(max(count, MOST_COUNTERS), dtype=torch.int32, device=device)
        _counters[device, stream] = found
    return found


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
    q_scale: torch.Tensor | None = None,
    num_splits: int | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    plan: AttentionPlan | None = None,
    launches: dict[Hashable, list[RepeatedLaunch]] | None = None,
) -> AttentionPlan | None:
    """Attention of tree rows: each sees the whole context and its own ancestors.

    Row i of a request sits at key position ``context + i`` of its pages, already written.
    All sizes are read from device memory; host integers only choose launch shapes, so a call
    can be captured in a CUDA graph with upper bounds.

    Parameters
    ----------
    out, q : torch.Tensor
        ``[num_tokens, Hq, D]`` bfloat16, float16 or float32, heads dense.  float32 is
        computed in float32 (no TF32).  `q` may also be float8_e4m3fn or float8_e5m2.
    k_cache, v_cache : torch.Tensor
        ``[num_blocks, block_size, Hkv, D]`` views of equal strides, of out's dtype or
        float8_e4m3fn / float8_e5m2.
    block_table : torch.Tensor
        ``[>= num_reqs, max_blocks]`` int32.
    query_start_loc, seq_lens : torch.Tensor
        ``[>= num_reqs + 1]`` and ``[>= num_reqs]`` int32; a sequence length counts context and
        query rows.  Requests without rows are skipped.
    tree_masks : torch.Tensor
        ``[>= num_reqs, W]`` int64, W >= max_query_len.  Bit j of word i: row i sees row j.
        For more than 64 rows ``[>= num_reqs, 2, W]``: words of rows 0..63, then of 64..127.
    scale : float
        Softmax scale, positive.
    num_reqs, max_query_len, max_seq_len : int
        Upper bounds of the launch; max_query_len <= 128.
    sliding_window : int
        0 or the number of tree positions a row sees, itself included; a row's position is
        ``context + depth`` with depth = popcount(mask) - 1.
    logit_soft_cap : float
        0 or c in ``c * tanh(score / c)``.
    sinks : torch.Tensor, optional
        ``[Hq]`` logits that take part in the softmax without a value.
    k_scale, v_scale, q_scale : torch.Tensor, optional
        ``[]``, ``[1]`` or ``[Hkv]`` float32 factors of the cached keys and values and of the
        queries, equally many in each.
    num_splits : int, optional
        KV ranges computed in parallel; default from the host integers and the device.
    workspace : torch.Tensor, optional
        float32, dense, at least ``workspace_elements(...)``; allocated when missing.
    counters : torch.Tensor, optional
        ``[MOST_COUNTERS]`` int32 zeros, zero again afterwards; calls that share them must not
        overlap. Without them a captured call clears some of its own, one launch more.
    plan : AttentionPlan, optional
        What a call returned whose arguments had the same shapes and types: nothing is checked
        again. The layers of a step differ in their tensors alone, and a check takes the host
        about 0.1 ms, longer than the kernel the GPU.
    launches : dict, optional
        Filled by the first call of a plan, for those that follow it on the same stream: they
        replace `out`, `q`, the caches, sinks and scales in it and keep all else, the workspace
        too. For other stages of a model with the same `plan` (other windows, soft caps, ..) it
        holds launches of their own.

    Returns
    -------
    AttentionPlan or None
        None if there was nothing to do.

    Examples
    --------
    Context of 100 keys and rows root, a, b (both under the root): masks ``0b1 0b11 0b101``,
    seq_lens ``103``; row b sees keys 0..99, 100 and 102.
    """
    num_tokens, num_heads, head_size = q.shape
    moved = {
        "out": out, "q": q, "k_cache": k_cache, "v_cache": v_cache, "sinks": sinks,
        "k_scale": k_scale, "v_scale": v_scale, "q_scale": q_scale,
    }  # fmt: skip
    kind = (
        scale, sliding_window, logit_soft_cap, sinks is None, q_scale is None, q.dtype,
        q.stride(0), out.stride(0), _num_scales(k_scale, v_scale, q_scale),
    )  # fmt: skip
    if plan is not None and launches and kind in launches:
        for repeat in launches[kind]:
            repeat(**moved)
        return plan
    if plan is None:
        check_tree_attention(
            out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks,
            scale=scale, num_reqs=num_reqs, max_query_len=max_query_len, max_seq_len=max_seq_len,
            sliding_window=sliding_window, logit_soft_cap=logit_soft_cap, sinks=sinks,
            k_scale=k_scale, v_scale=v_scale, q_scale=q_scale,
        )  # fmt: skip
        require(out.dtype != torch.float64, "out", out.dtype, "bfloat16, float16 or float32")
        check_runnable("q", q, tree_attention_kernel)
        if num_reqs == 0 or num_tokens == 0:
            return None
        num_kv_heads = k_cache.shape[2]
        plan = plan_attention(
            num_reqs=num_reqs, num_kv_heads=num_kv_heads, group=num_heads // num_kv_heads,
            head_size=head_size, item_size=out.element_size(), max_query_len=max_query_len,
            max_seq_len=max_seq_len, num_multiprocessors=num_multiprocessors(q.device),
            num_tokens=num_tokens, num_splits=num_splits,
        )  # fmt: skip
    needed = workspace_elements(num_tokens, num_heads, head_size, plan.num_splits)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
    else:
        check_tensor(
            "workspace", workspace, shape=[at_least(needed)], dtype=torch.float32, device=q.device
        )
    made = launch(
        plan, out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, scale,
        num_reqs, max_query_len, sliding_window, logit_soft_cap, sinks, k_scale, v_scale, q_scale,
        workspace, counters,
    )  # fmt: skip
    if launches is not None:
        launches[kind] = made
    return plan


def _mask_words(tree_masks: torch.Tensor, max_query_len: int) -> tuple[torch.Tensor, int]:
    """Masks that a launch reads, and how far a row's second word lies from its first.

    Batches of at most 64 rows need no second word, whatever the table holds: distance 0.
    """
    if tree_masks.dim() == 2:
        return tree_masks, 0
    if max_query_len <= WORD_BITS:
        return tree_masks[:, 0], 0
    return tree_masks, tree_masks.stride(1)


def _num_scales(*scales: torch.Tensor | None) -> int:
    return max((factors.numel() for factors in scales if factors is not None), default=1)


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
    q_scale: torch.Tensor | None,
    workspace: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> list[RepeatedLaunch]:
    """Run a plan on checked arguments (also the tuner's way in); its launches, to repeat them."""
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    is_split = plan.num_splits > 1
    last_joins = is_split and plan.join_rows == 0
    chained = is_split and not last_joins and can_chain(q.device)
    needed = plan.row_tiles * num_reqs * num_kv_heads
    if last_joins and (counters is None or len(counters) < needed):
        counters = join_counters(q.device, needed)
    tree_masks, second_word = _mask_words(tree_masks, max_query_len)
    layout = {
        "WINDOW": sliding_window, "SCALES": _num_scales(k_scale, v_scale, q_scale),
        "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_SIZE": head_size,
        "PADDED_HEAD": power_of_two_from(head_size), "BLOCK_KEYS": plan.block_keys,
        "MIN_TILES": plan.min_tiles, "CHAINED": chained,
    }  # fmt: skip
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    if plan.max_registers is not None:
        options["maxnreg"] = plan.max_registers
    common = {
        "out": out, "workspace": workspace, "query_start_loc": query_start_loc,
        "seq_lens": seq_lens, "sinks": sinks, "v_scale": v_scale, "num_tokens": num_tokens,
        "out_stride": out.stride(0), **layout,
    }  # fmt: skip
    made = [
        RepeatedLaunch(
            tree_attention_kernel,
            (plan.row_tiles, num_reqs * num_kv_heads, plan.num_splits),
            common
            | {
                "q": q, "k_cache": k_cache, "v_cache": v_cache, "block_table": block_table,
                "tree_masks": tree_masks, "k_scale": k_scale, "q_scale": q_scale,
                "counters": counters, "q_stride": q.stride(0),
                "table_stride": block_table.stride(0), "masks_stride": tree_masks.stride(0),
                "SCALE": scale, "SOFT_CAP": logit_soft_cap, "BLOCK_ROWS": plan.block_rows,
                "SECOND_WORD": second_word, "IS_SPLIT": is_split, "LAST_JOINS": last_joins,
                **_cache_layout(k_cache, v_cache),
            },
            options,
        )
    ]  # fmt: skip
    if is_split and not last_joins:
        made.append(
            RepeatedLaunch(
                join_splits_kernel,
                (ceil_div(max_query_len * group, plan.join_rows), num_reqs * num_kv_heads),
                common
                | {"num_splits": plan.num_splits, "JOIN_ROWS": plan.join_rows, "IN_FLIGHT": 8},
                {"num_warps": 4, **({"launch_pdl": True} if chained else {})},
            )
        )
    for one in made:
        one()
    return made


def add_tree_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
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
    logit_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
) -> None:
    """Complete attention over the context with the keys of the tree.

    For kernels that know no tree masks: they attend to the context alone, where every row
    sees everything, and this one adds the rows' ancestors. Arguments as of
    :func:`tree_attention`, without sliding windows, and

    Parameters
    ----------
    out : torch.Tensor
        ``[num_tokens, Hq, D]`` attention over the first ``seq_len - query_len`` keys, in its
        final scale, replaced
        by attention over those and the tree. What stands in rows without context is ignored.
    lse : torch.Tensor
        ``[Hq, num_tokens]`` float32, natural logarithm of the sum of ``exp(score)`` over the
        context, without sinks.
    """
    check_tree_attention(
        out, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, scale=scale,
        num_reqs=num_reqs, max_query_len=max_query_len, max_seq_len=max_seq_len,
        sliding_window=0, logit_soft_cap=logit_soft_cap, sinks=sinks, k_scale=k_scale,
        v_scale=v_scale, q_scale=q_scale,
    )  # fmt: skip
    num_tokens, num_heads, head_size = q.shape
    shape = [num_heads, num_tokens]
    check_tensor("lse", lse, shape=shape, dtype=torch.float32, device=q.device)
    check_runnable("q", q, tree_part_kernel)
    if num_reqs == 0 or num_tokens == 0:
        return
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    padded_head = power_of_two_from(head_size)
    is_small = out.element_size() == 2 and padded_head <= 128
    block_rows = min(max(16, power_of_two_from(max_query_len * group)), 64 if is_small else 16)
    row_tiles = ceil_div(max_query_len * group, block_rows)
    chained = can_chain(q.device)
    tree_masks, second_word = _mask_words(tree_masks, max_query_len)
    tree_part_kernel[(row_tiles, num_reqs * num_kv_heads)](
        out, lse, q, k_cache, v_cache, block_table, query_start_loc, seq_lens, tree_masks, sinks,
        k_scale, v_scale, q_scale, out.stride(0), lse.stride(0), q.stride(0), block_table.stride(0),
        tree_masks.stride(0), **_cache_layout(k_cache, v_cache),
        SCALE=scale, SOFT_CAP=logit_soft_cap, SCALES=_num_scales(k_scale, v_scale, q_scale),
        NUM_KV_HEADS=num_kv_heads, GROUP=group,
        HEAD_SIZE=head_size, PADDED_HEAD=padded_head, BLOCK_ROWS=block_rows,
        BLOCK_KEYS=64 if is_small else 16, SECOND_WORD=second_word,
        CHAINED=chained, num_warps=4, num_stages=1, **({"launch_pdl": True} if chained else {}),
    )  # fmt: skip
