"""Other projects' attention under a tree mask, and FlashAttention 3 under a causal one.

Each function takes the arguments of ``tree_attention`` for a batch of equal trees and equal
contexts and returns what launches the peer's kernels; whatever a server would prepare once a
step is prepared here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

XFORMERS_PAGE = 64  # the smallest that its kernel takes
FLASHINFER_WORKSPACE_BYTES = 256 << 20


def missing(name: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    if find_spec(name) is None:
        return f"{name} is not installed (pip install vllm-medusa[peers])"
    return None


def ancestor_bits(arguments: dict[str, Any]) -> torch.Tensor:
    """``[rows, rows]`` bool: who sees whom in the first request's tree."""
    rows = arguments["max_query_len"]
    seen = torch.arange(rows, device=arguments["q"].device)
    masks = arguments["tree_masks"][0]
    words = masks.view(-1, masks.shape[-1])[seen // 64, :rows]
    return (words.T >> seen % 64 & 1).bool()


def vllm_triton(arguments: dict[str, Any]) -> Callable[[], None]:
    """vLLM's unified Triton attention with the tree as an additive bias."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    a, rows = arguments, arguments["max_query_len"]
    bias = torch.where(ancestor_bits(a), 0.0, float("-inf")).contiguous()
    return lambda: unified_attention(
        q=a["q"], k=a["k_cache"], v=a["v_cache"], out=a["out"],
        cu_seqlens_q=a["query_start_loc"], max_seqlen_q=rows, seqused_k=a["seq_lens"],
        max_seqlen_k=a["max_seq_len"], softmax_scale=a["scale"], causal=True,
        window_size=(-1, -1), block_table=a["block_table"], softcap=0, q_descale=None,
        k_descale=None, v_descale=None, qq_bias=bias,
    )  # fmt: skip


def flash_attention(arguments: dict[str, Any]) -> Callable[[], None]:
    """FlashAttention 3, causal."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    a = arguments
    return lambda: flash_attn_varlen_func(
        q=a["q"], k=a["k_cache"], v=a["v_cache"], out=a["out"],
        cu_seqlens_q=a["query_start_loc"], max_seqlen_q=a["max_query_len"],
        seqused_k=a["seq_lens"], max_seqlen_k=a["max_seq_len"], softmax_scale=a["scale"],
        causal=True, block_table=a["block_table"], fa_version=3,
    )  # fmt: skip


def flashinfer(arguments: dict[str, Any]) -> Callable[[], None]:
    """FlashInfer's paged prefill with a packed custom mask over context and tree."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    a, device = arguments, arguments["q"].device
    num_reqs, rows, length = a["num_reqs"], a["max_query_len"], a["max_seq_len"]
    num_kv_heads, block_size = a["k_cache"].shape[2], a["k_cache"].shape[1]
    pages = a["block_table"].shape[1]
    visible = torch.ones(rows, length, dtype=torch.bool, device=device)
    visible[:, length - rows :] = ancestor_bits(a)
    # Halves of one cache are strided; FlashInfer is given dense ones, the same bytes.
    caches = a["k_cache"].contiguous(), a["v_cache"].contiguous()
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    # Its FlashAttention 3 kernels take no custom mask.
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=device)
    wrapper.plan(
        starts * rows, starts * pages, a["block_table"].flatten(),
        torch.full_like(starts[1:], (length - 1) % block_size + 1),
        a["q"].shape[1], num_kv_heads, a["q"].shape[2], block_size,
        custom_mask=visible.flatten().repeat(num_reqs), causal=False, sm_scale=a["scale"],
        q_data_type=a["q"].dtype, kv_data_type=a["k_cache"].dtype,
    )  # fmt: skip
    return lambda: wrapper.run(a["q"], caches, out=a["out"])


def xformers(arguments: dict[str, Any]) -> Callable[[], None]:
    """xformers' tree attention, as the plugin's optional backend calls it; pages of 64 keys."""
    from vllm_medusa.xformers_attention import attend, context_mask

    a, rows = arguments, arguments["max_query_len"]
    length = a["max_seq_len"]
    (keys, values), table = _repaged(a, XFORMERS_PAGE)
    own = torch.arange(length - rows, length, device=table.device)
    blocks = table[:, own // XFORMERS_PAGE].long().flatten()
    slots = (own % XFORMERS_PAGE).repeat(len(table))
    own_keys, own_values = keys[blocks, slots], values[blocks, slots]
    mask = context_mask(
        a["query_start_loc"], a["seq_lens"] - rows, table, rows=rows,
        page_size=XFORMERS_PAGE, max_context=length,
    )  # fmt: skip
    bias = torch.zeros(rows, rows, dtype=a["q"].dtype, device=table.device)
    bias.masked_fill_(~ancestor_bits(a), float("-inf"))
    return lambda: attend(a["out"], a["q"], own_keys, own_values, keys, values, mask, bias)


def _repaged(
    a: dict[str, Any], page: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same keys and values in pages of another size, in random order, and their table."""
    num_reqs, length = a["num_reqs"], a["max_seq_len"]
    pages = -(-length // page)
    cache = torch.cat([a["k_cache"], a["v_cache"]], -1)
    rows = cache[a["block_table"].long()].flatten(1, 2)[:, :length]
    order = torch.randperm(num_reqs * pages, device=cache.device).view(num_reqs, pages)
    keys = torch.arange(length, device=cache.device)
    made = cache.new_zeros(num_reqs * pages, page, *cache.shape[2:])
    made[order[:, keys // page], keys % page] = rows
    return made.split(a["q"].shape[2], -1), order.to(torch.int32)
