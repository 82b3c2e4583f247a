"""Plain PyTorch twins of drafts; need no Triton."""

from __future__ import annotations

import torch

from .checks_draft import check_best_tree, check_draft_tree, check_top_tokens
from .draft_workspace import DraftWorkspace
from .lookup_types import Chains
from .noise_types import DrawNoise
from .reference_noise import with_noise
from .tree_types import Candidates, FixedTree, TreeTables


def draft_tree(
    out: torch.Tensor,  # [>= R, N] int64
    logits: torch.Tensor,  # [R, K, V]
    node_columns: torch.Tensor,  # [N] int64
    *,
    num_top: int,
    token_map: torch.Tensor | None = None,  # [1 or K, V] int64
    noise: DrawNoise | None = None,
    workspace: DraftWorkspace | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.draft.draft_tree`; needs no workspace."""
    check_draft_tree(
        out, logits, node_columns, num_top=num_top, token_map=token_map, noise=noise,
        workspace=workspace,
    )  # fmt: skip
    num_reqs, num_heads, _ = logits.shape
    if noise is not None:
        logits = with_noise(logits, token_map, noise)
    ids = best_tokens(logits, num_top)
    if token_map is not None:
        ids = token_map.expand(num_reqs, num_heads, -1).gather(2, ids)
    out[:num_reqs] = ids.flatten(1)[:, node_columns]


def best_tokens(
    logits: torch.Tensor,  # [..., V]
    num_top: int,
) -> torch.Tensor:
    """Ids of the `num_top` largest logits, best first, the lower id first among equals.

    NaN counts as -inf.  ``[..., num_top]`` int64.
    """
    values, ids = logits.topk(num_top, dim=-1)
    # topk leaves the order of equals open, and which of them it takes; sorting the whole
    # vocabulary settles both, but takes a CPU ten times as long, so only where there are any.
    is_open = (values[..., 1:] == values[..., :-1]).any(-1) | values.isnan().any(-1)
    is_open |= (logits == values[..., -1:]).sum(-1) > 1
    if bool(is_open.any()):
        known = torch.where(logits.isnan(), float("-inf"), logits)
        ids = known.sort(dim=-1, descending=True, stable=True).indices[..., :num_top]
    return ids


def top_tokens(
    tokens: torch.Tensor,  # [>= R, K, T] int64, or [>= R, W]
    log_probs: torch.Tensor,  # like tokens, float32
    logits: torch.Tensor,  # [R, K, V]
    *,
    weights: torch.Tensor | None = None,  # [K] float32
    token_map: torch.Tensor | None = None,  # [1 or K, V] int64
    columns: torch.Tensor | None = None,  # [K, T] int32
    noise: DrawNoise | None = None,
    workspace: DraftWorkspace | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.draft_tokens.top_tokens`; needs no workspace."""
    check_top_tokens(
        tokens, log_probs, logits, weights=weights, token_map=token_map, columns=columns,
        noise=noise, workspace=workspace,
    )  # fmt: skip
    num_reqs, num_heads, _ = logits.shape
    if num_reqs == 0:
        return
    if noise is not None:
        logits = with_noise(logits, token_map, noise)
    ids = best_tokens(logits, (tokens if columns is None else columns).shape[-1])
    limits = torch.finfo(torch.float32)
    known = logits.float().nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    largest = known.amax(-1, keepdim=True)
    log_sum = (known - largest).exp().sum(-1, keepdim=True).log()
    best = ((known.gather(2, ids) - largest) - log_sum).clamp(max=0.0)
    best = best if weights is None else best * weights[:, None]
    if token_map is not None:
        ids = token_map.expand(num_reqs, num_heads, -1).gather(2, ids)
    for table, found in ((tokens, ids), (log_probs, best)):
        if columns is None:
            table[:num_reqs] = found
        else:
            table[:num_reqs, columns[columns >= 0].long()] = found[:, columns >= 0]


def best_tree(
    out: torch.Tensor,  # [>= R, N] int64
    tables: TreeTables,  # [S, W] each, in place
    tokens: torch.Tensor,  # [>= R, K, T] int64
    log_probs: torch.Tensor,  # [>= R, K, T] float32
    slots: torch.Tensor,  # [R]
    candidates: Candidates,
    fixed: FixedTree,
    *,
    chains: Chains | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.tree_choice.best_tree`; needs no scratch."""
    check_best_tree(out, tables, tokens, log_probs, slots, candidates, fixed, chains, scratch)
    num_reqs, num_nodes = slots.shape[0], out.shape[1]
    if num_reqs == 0:
        return
    slots = slots.long()
    flat_tokens = tokens[:num_reqs].flatten(1)
    costs = candidate_costs(log_probs[:num_reqs].flatten(1), candidates.columns)
    if chains is not None:
        costs, candidates, flat_tokens = with_chains(costs, candidates, flat_tokens, chains)
    order = costs.sort(dim=1, stable=True).indices[:, :num_nodes]
    # Candidate -> row of the tree, 0 where it is not in it.
    rows = order.new_zeros(costs.shape)
    rows.scatter_(1, order, torch.arange(1, num_nodes + 1, device=order.device).expand_as(order))
    columns, parents, depths = (torch.zeros_like(order) for _ in range(3))
    masks, above = torch.ones_like(order), torch.zeros_like(order)
    for level_columns, level_ancestors in zip(*candidates, strict=True):
        ancestors = level_ancestors.expand_as(costs).gather(1, order).long()
        is_there = ancestors >= 0
        own_rows = rows.gather(1, ancestors.clamp(min=0))
        masks = torch.where(is_there, masks | (1 << own_rows), masks)
        parents = torch.where(is_there, above, parents)
        depths += is_there
        level_columns = level_columns.expand_as(costs).gather(1, order).long()
        columns = torch.where(is_there, level_columns, columns)
        above = own_rows
    is_fixed = ((slots < 0) | (fixed.slots[slots.clamp(min=0)] != 0))[:, None]
    columns = torch.where(is_fixed, fixed.columns.long(), columns)
    out[:num_reqs] = flat_tokens.gather(1, columns)
    is_request = slots >= 0
    for table, own, other in zip(tables, (parents, depths, masks), fixed[2:], strict=True):
        chosen = torch.where(is_fixed, other[1:], own.to(table.dtype))
        table[slots[is_request], 1:] = chosen[is_request]


def candidate_costs(
    log_probs: torch.Tensor,  # [R, K * T] float32
    columns: torch.Tensor,  # [K, U] int32, -1 beyond a candidate's depth
) -> torch.Tensor:
    """Negative log probability of every candidate: [R, U] float32."""
    infinite = float("inf")
    cost = (-log_probs).nan_to_num(nan=infinite, posinf=infinite, neginf=-infinite).clamp(min=0.0)
    costs = cost.new_zeros(cost.shape[0], columns.shape[1])
    # From the root on, so that no rounding makes a child cheaper than its parent.
    for level in columns.long():
        costs += torch.where(level >= 0, cost[:, level.clamp(min=0)], 0.0)
    return costs


def with_chains(
    costs: torch.Tensor,  # [R, U] float32
    candidates: Candidates,
    tokens: torch.Tensor,  # [R, K * T] int64
    chains: Chains,
) -> tuple[torch.Tensor, Candidates, torch.Tensor]:
    """Every request's own candidates: the heads', then what its chain adds to them.

    Returns
    -------
    costs : torch.Tensor, [R, U + L] float32
        Infinite, and never chosen, where the heads have the chain's node too.
    candidates : Candidates
        ``[R, U + L]`` in place of each depth's ``[U]``, for max(K, L) depths.
    tokens : torch.Tensor, [R, K * T + L] int64
    """
    (num_reqs, num_paths), length = costs.shape, chains.tokens.shape[1]
    num_columns, num_heads = tokens.shape[1], len(candidates.columns)
    heads, steps = candidates.columns.long(), torch.arange(length, device=costs.device)
    chain, matches = chains.tokens[:num_reqs], chains.matches[:num_reqs].long()
    own_costs = chains.costs[matches]  # [R, L]
    # Candidates that are the chain's own first tokens: one of every depth up to `shared`.
    depths = (heads >= 0).sum(0)
    is_spelt = (matches > 0)[:, None] & (depths <= length)
    for level in range(min(num_heads, length)):
        same = tokens[:, heads[level].clamp(min=0)] == chain[:, level, None]
        is_spelt &= (heads[level] < 0) | same
    spelt_depths = depths * is_spelt
    shared = spelt_depths.amax(1, keepdim=True)
    lower = torch.minimum(costs, own_costs[:, (depths - 1).clamp(max=length - 1)])
    costs = torch.where(is_spelt, lower, costs)
    own_costs = torch.where(steps >= shared, own_costs, float("inf"))
    # Depth - 1 -> candidate on the chain: the heads' as far as they share it, then its own.
    line = (num_paths + steps).expand(num_reqs, -1).clone()
    for level in range(min(num_heads, length)):
        place = (spelt_depths == level + 1).int().argmax(1)
        line[:, level] = torch.where(shared[:, 0] > level, place, line[:, level])
    num_levels = max(num_heads, length)
    shape = (num_levels, num_reqs, num_paths + length)
    columns, ancestors = (torch.full(shape, -1, device=costs.device) for _ in range(2))
    for target, source in ((columns, heads), (ancestors, candidates.ancestors.long())):
        target[:num_heads, :, :num_paths] = source[:, None]
    is_above = steps[:, None] <= steps  # depth of an ancestor, depth of a link
    # Columns of a link's ancestors are not asked for.
    columns[:length, :, num_paths:] = torch.where(is_above, num_columns + steps, -1)[:, None]
    above = torch.where(is_above[:, None], line.T[:, :, None], -1)
    ancestors[:length, :, num_paths:] = above
    merged = torch.cat([costs, own_costs], 1)
    return merged, Candidates(columns, ancestors), torch.cat([tokens, chain], 1)
