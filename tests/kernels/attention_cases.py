"""Paged batches of tree requests, and attention written from its definition in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from kernel_cases import ancestors_of, cumulated, depths_of, mask_table, padded_rows


@dataclass(frozen=True)
class Case:
    """One batch.  `trees[r]` are parents, None for a padded request without rows."""

    trees: tuple[tuple[int, ...] | None, ...]
    contexts: tuple[int, ...]
    kv_heads: int = 2
    group: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    query_dtype: torch.dtype | None = None
    head_first: bool = False  # memory order of the cache: heads before slots
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    scales: int = 0  # elements of k_scale, v_scale and q_scale, 0 = none
    num_splits: int | None = 1
    seed: int = 0

    @property
    def query_lens(self) -> list[int]:
        return [len(tree) if tree else 0 for tree in self.trees]


def _fill_cache(case: Case, tables: list[list[int]], num_blocks: int) -> torch.Tensor:
    """``[num_blocks, Hkv, block_size, 2 * D]``, NaN wherever no key of the batch lives."""
    generator = torch.Generator().manual_seed(case.seed)
    order = (num_blocks, case.kv_heads, case.block_size)
    if not case.head_first:
        order = (num_blocks, case.block_size, case.kv_heads)
    dtype = case.cache_dtype or case.dtype
    cache = torch.full((*order, 2 * case.head_size), float("nan"), dtype=torch.float32)
    cache = cache if case.head_first else cache.transpose(1, 2)
    for table, context, rows in zip(tables, case.contexts, case.query_lens, strict=True):
        if rows == 0:
            continue
        first = max(context - case.window + 1, 0) if case.window else 0
        keys = torch.arange(first, context + rows)
        blocks = torch.tensor(table)[keys // case.block_size]
        values = torch.randn(len(keys), case.kv_heads, 2 * case.head_size, generator=generator)
        cache[blocks, :, keys % case.block_size] = values
    return cache.to(dtype)  # keeps strides: the layout is dense


def build(case: Case, device: torch.device) -> dict:
    """Keyword arguments of the launcher; `out` is poisoned with NaN."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    needed = [-(-(c + n) // case.block_size) for c, n in
              zip(case.contexts, case.query_lens, strict=True)]  # fmt: skip
    num_blocks = sum(needed) + 3
    # Blocks in random order; the last three belong to nobody.
    order = torch.randperm(num_blocks - 3, generator=generator).tolist()
    tables, width = [], max([*needed, 1])
    for count in needed:
        own, order = order[:count], order[count:]
        tables.append(own)
    cache = _fill_cache(case, tables, num_blocks).to(device)
    num_tokens = sum(case.query_lens) + 2  # rows at the end that belong to nobody
    num_heads = case.kv_heads * case.group
    fused = torch.randn(
        num_tokens, num_heads + 2 * case.kv_heads, case.head_size, generator=generator
    )
    fused = fused.to(case.query_dtype or case.dtype).to(device)
    factors = [None, None, None]
    if case.scales:
        factors = [
            (torch.rand(case.scales, generator=generator) + 0.5).to(device) for _ in range(3)
        ]
    sinks = torch.randn(num_heads, generator=generator).to(device) if case.sinks else None
    k_cache, v_cache = cache.transpose(1, 2).split(case.head_size, -1)
    widest = max([*case.query_lens, 1])
    return {
        "out": torch.full((num_tokens, num_heads, case.head_size), float("nan"),
                          dtype=case.dtype, device=device),
        "q": fused[:, :num_heads],  # a strided view, as after a fused projection
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": padded_rows(tables, width, num_blocks - 1, torch.int32).to(device),
        "query_start_loc": cumulated(case.query_lens).to(device),
        "seq_lens": torch.tensor(
            [c + n for c, n in zip(case.contexts, case.query_lens, strict=True)],
            dtype=torch.int32,
        ).to(device),
        "tree_masks": mask_table(list(case.trees), widest, -1).to(device),
        "scale": 1 / math.sqrt(case.head_size),
        "num_reqs": len(case.trees),
        "max_query_len": widest,
        "max_seq_len": max(c + n for c, n in zip(case.contexts, case.query_lens, strict=True)),
        "sliding_window": case.window,
        "logit_soft_cap": case.soft_cap,
        "sinks": sinks,
        "k_scale": factors[0],
        "v_scale": factors[1],
        "q_scale": factors[2],
        "num_splits": case.num_splits,
    }  # fmt: skip


def in_float64(arguments: dict) -> dict:
    """The same batch on the CPU in float64, for the twin as ground truth."""
    exact = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for name in ("out", "q", "k_cache", "v_cache"):
        exact[name] = exact[name].to(torch.float64)
    # The conversion densifies the halves of the cache; both get the same strides.
    exact["q"], exact["out"] = exact["q"].contiguous(), exact["out"].contiguous()
    exact["k_cache"], exact["v_cache"] = (
        exact[name].contiguous() for name in ("k_cache", "v_cache")
    )
    return exact


def attention_over_context(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """``[num_tokens, Hq, D]`` and ``[Hq, num_tokens]`` log-sum-exp, float64, on the CPU.

    Rows without context hold NaN and +inf, as FlashAttention may leave them.
    """
    exact = in_float64(arguments)
    q = exact["q"]
    out, lse = torch.full_like(q, float("nan")), q.new_full(q.shape[:2], float("inf")).T
    starts, group = exact["query_start_loc"].tolist(), q.shape[1] // exact["k_cache"].shape[2]
    for r in range(exact["num_reqs"]):
        rows = slice(starts[r], starts[r + 1])
        context = int(exact["seq_lens"][r]) - (rows.stop - rows.start)
        if rows.stop == rows.start or context == 0:
            continue
        keys = torch.arange(context)
        block_size = exact["k_cache"].shape[1]
        blocks = exact["block_table"][r, keys // block_size].long()
        k, v = (exact[name][blocks, keys % block_size].repeat_interleave(group, 1)
                for name in ("k_cache", "v_cache"))  # fmt: skip
        factors = [exact[name] for name in ("k_scale", "v_scale", "q_scale")]
        k_scale, v_scale, q_scale = (
            1.0 if f is None else f.double().expand(q.shape[1] // group).repeat_interleave(group)
            for f in factors
        )
        scores = torch.einsum("nhd,shd->hns", q[rows], k) * exact["scale"]
        scores = scores * torch.as_tensor(k_scale * q_scale).reshape(-1, 1, 1)
        v = v * torch.as_tensor(v_scale).reshape(-1, 1)
        if cap := exact["logit_soft_cap"]:
            scores = cap * torch.tanh(scores / cap)
        out[rows] = torch.einsum("hns,shd->nhd", scores.softmax(2), v)
        lse[:, rows] = scores.logsumexp(2)
    return out, lse


def attention_by_definition(case: Case, arguments: dict) -> torch.Tensor:
    """Row by row: softmax over the context and the row's ancestors, in float64.

    Each row is an ordinary decode step of the sequence context + path from the root, which
    is what makes tree verification lossless.
    """
    exact = in_float64(arguments)
    out = exact["out"]
    for r, tree in enumerate(case.trees):
        if not tree:
            continue
        start, context = int(exact["query_start_loc"][r]), case.contexts[r]
        depths = depths_of(list(tree))
        for row in range(len(tree)):
            path = ancestors_of(list(tree), row)
            keys = [*range(context), *(context + node for node in path)]
            if case.window:
                keys = keys[-case.window :]  # the last positions of the row's own sequence
            assert case.window or len(keys) == context + depths[row] + 1
            places = [(int(exact["block_table"][r, k // case.block_size]), k % case.block_size)
                      for k in keys]  # fmt: skip
            blocks, slots = torch.tensor(places).T
            k, v = (exact[name][blocks, slots] for name in ("k_cache", "v_cache"))
            if case.scales:
                k = k * (exact["k_scale"].double() * exact["q_scale"].double())[:, None]
                v = v * exact["v_scale"].double()[:, None]
            for head in range(exact["q"].shape[1]):
                scores = k[:, head // case.group] @ exact["q"][start + row, head] * exact["scale"]
                if case.soft_cap:
                    scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
                weights = scores.exp()
                total = weights.sum() + (exact["sinks"][head].double().exp() if case.sinks else 0)
                out[start + row, head] = weights / total @ v[:, head // case.group]
    return out
