"""This package's tree attention as its benchmarks call it: whole, in two parts, under any plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attention_shapes import DEVICE, Shape, chain_masks

from vllm_medusa.triton_kernels import add_tree_attention, attention, tree_attention
from vllm_medusa.triton_kernels.attention_plan import (
    MOST_COUNTERS,
    AttentionPlan,
    plan_attention,
    workspace_elements,
)
from vllm_medusa.triton_kernels.repeated_launch import RepeatedLaunch


def join_counters() -> torch.Tensor:
    """Zeros that a call leaves as it finds them."""
    return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=DEVICE)


def ours(arguments: dict[str, Any]) -> Callable[[], None]:
    """This package's kernel, with counters of the server's, as the plugin calls it."""
    counters = join_counters()
    return lambda: tree_attention(counters=counters, **arguments)


def ours_causal(arguments: dict[str, Any]) -> Callable[[], None]:
    """This package's kernel with the masks of a chain: what the tree's mask costs."""
    chain = chain_masks(arguments["max_query_len"])
    chain = chain.expand(arguments["num_reqs"], *chain.shape).contiguous()
    return ours(arguments | {"tree_masks": chain})


def two_parts(arguments: dict[str, Any]) -> Callable[[], None]:
    """FlashAttention 3 over the context, this package's kernel for the tree's own keys."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    a = arguments
    context = a["seq_lens"] - a["max_query_len"]

    def run() -> None:
        out, lse = flash_attn_varlen_func(
            q=a["q"], k=a["k_cache"], v=a["v_cache"], out=a["out"],
            cu_seqlens_q=a["query_start_loc"], max_seqlen_q=a["max_query_len"],
            seqused_k=context, max_seqlen_k=a["max_seq_len"], softmax_scale=a["scale"],
            causal=False, block_table=a["block_table"], fa_version=3, return_softmax_lse=True,
        )  # fmt: skip
        add_tree_attention(lse=lse, **a | {"out": out})

    return run


def chosen_plan(shape: Shape) -> AttentionPlan:
    """What the launcher takes by itself."""
    return plan_attention(
        num_reqs=shape.batch, num_kv_heads=shape.kv_heads, group=shape.heads // shape.kv_heads,
        head_size=shape.head_size, item_size=2, max_query_len=shape.rows,
        max_seq_len=shape.context + shape.rows,
        num_multiprocessors=attention.num_multiprocessors(DEVICE),
    )  # fmt: skip


def with_plan(plan: AttentionPlan, a: dict[str, Any]) -> Callable[[], list[RepeatedLaunch]]:
    """The kernel under a plan that the launcher may not choose; gives its launches."""
    num_tokens, heads, head_size = a["q"].shape
    elements = workspace_elements(num_tokens, heads, head_size, plan.num_splits)
    workspace = torch.empty(elements, dtype=torch.float32, device=DEVICE)
    counters = join_counters()
    tensors = [a[name] for name in ("out", "q", "k_cache", "v_cache", "block_table",
                                    "query_start_loc", "seq_lens", "tree_masks")]  # fmt: skip
    return lambda: attention.launch(
        plan, *tensors, a["scale"], a["num_reqs"], a["max_query_len"], 0, 0.0, *[None] * 4,
        workspace, counters,
    )  # fmt: skip
