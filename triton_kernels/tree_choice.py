"""Choose every request's next tree: the n likeliest nodes, on the device, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable
from .checks_draft import check_best_tree
from .lookup_types import Chains
from .selection import ranks_of, smallest
from .tree_types import Candidates, FixedTree, TreeTables

_NUM_WARPS = 8

_NEVER: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # above the bits of every cost


@triton.jit
def _spelt(
    row_tokens,  # [K * T] int64, tokens of the heads' ranks
    row_chain,  # [LENGTH] int64
    columns,  # [DEPTH, num_candidates] int32
    candidates,
    num_candidates,
    match,
    DEPTH: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Which candidates are the chain's own first tokens, and how deep every candidate is.

    Heads score distinct tokens, so at most one candidate of a depth is; and its parent is too.
    Places behind the heads' candidates are the chain's.
    """
    is_path = (candidates >= 0) & (candidates < num_candidates)
    is_spelt = is_path & (candidates < tl.where(match > 0, num_candidates, 0))
    depths = tl.where(candidates >= num_candidates, candidates - num_candidates + 1, 0)
    for level in tl.static_range(DEPTH):
        column = tl.load(columns + level * num_candidates + candidates, mask=is_path, other=-1)
        token = tl.load(row_tokens + column, mask=column >= 0, other=-1)
        wanted = tl.load(row_chain + level) if level < LENGTH else tl.full([], -2, tl.int64)
        is_spelt = is_spelt & ((column < 0) | (token == wanted))
        depths += (column >= 0).to(tl.int32)
    return is_spelt, depths


@triton.jit
def _merged_costs(
    costs,  # bits, of the heads' candidates
    is_spelt,
    depths,
    candidates,
    num_candidates,
    shared,  # depth to which the heads have the chain too
    row_costs,  # [LENGTH] float32
    LENGTH: tl.constexpr,
):
    """Bits of all costs, and what is on the chain.

    A node that both have is one node, at the lower price.  It is the heads'; the chain's own
    begin below it.
    """
    is_link = (candidates >= num_candidates + shared) & (candidates < num_candidates + LENGTH)
    is_on_chain = is_link | is_spelt
    cost = tl.load(row_costs + depths - 1, mask=is_on_chain, other=0.0)
    bits = cost.to(tl.int32, bitcast=True).to(tl.uint32)
    costs = tl.where(is_link, bits, tl.where(is_spelt, tl.minimum(costs, bits), costs))
    return costs, is_on_chain


@triton.jit
def _path_costs(
    row_log_probs,  # [K * T] float32
    columns,  # [DEPTH, num_candidates] int32
    candidates,
    is_candidate,
    num_candidates,
    DEPTH: tl.constexpr,
):
    """Bits of a path's negative log probability, which order as the numbers do.

    Summed from the root on, so that no rounding makes a child cheaper than its parent.
    """
    costs = tl.zeros(candidates.shape, tl.float32)
    for level in tl.static_range(DEPTH):
        column = tl.load(columns + level * num_candidates + candidates, mask=is_candidate, other=-1)
        cost = -tl.load(row_log_probs + column, mask=column >= 0, other=0.0)
        cost = tl.where(cost == cost, cost, float("inf"))
        costs += tl.maximum(cost, 0.0)
    return tl.where(is_candidate, costs.to(tl.int32, bitcast=True), _NEVER).to(tl.uint32)


@triton.jit
def _best_tree_kernel(
    out,  # out [R, N] int64
    parents,  # out [S, W] int32
    depths,  # out [S, W] int32
    masks,  # out [S, W] int64
    scratch,  # scratch [R, N] int32
    tokens,  # in [R, NUM_COLUMNS] int64
    log_probs,  # in [R, NUM_COLUMNS] float32
    slots,  # in [R] int64, negative: no request
    columns,  # in [DEPTH, num_candidates] int32
    ancestors,  # in [DEPTH, num_candidates] int32
    fixed_slots,  # in [S] int32
    fixed_columns,  # in [N] int32
    fixed_parents,  # in [W] int32
    fixed_depths,  # in [W] int32
    fixed_masks,  # in [W] int64
    chain_tokens,  # in [R, LENGTH] int64, or None
    chain_matches,  # in [R] int32, or None
    chain_costs,  # in [matches, LENGTH] float32, or None
    out_stride,
    parents_stride,
    depths_stride,
    masks_stride,
    num_candidates,
    DEPTH: tl.constexpr,
    LENGTH: tl.constexpr,  # of the chains, 0 without them
    NUM_COLUMNS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    PADDED_NODES: tl.constexpr,
    PADDED_CANDIDATES: tl.constexpr,
):
    """Grid: (R,). One program chooses one request's tree."""
    req = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + req).to(tl.int64)
    is_request = slot >= 0
    is_fixed = tl.load(fixed_slots + slot, mask=is_request, other=1)
    nodes = tl.arange(0, PADDED_NODES)
    is_node = nodes < NUM_NODES
    link_place = tl.full([PADDED_NODES], -1, tl.int32)
    if is_fixed != 0:
        row = nodes + 1
        column = tl.load(fixed_columns + nodes, mask=is_node, other=0)
        parent = tl.load(fixed_parents + row, mask=is_node, other=0)
        depth = tl.load(fixed_depths + row, mask=is_node, other=0)
        mask = tl.load(fixed_masks + row, mask=is_node, other=0)
    else:
        row_log_probs = log_probs + req * NUM_COLUMNS
        everyone = tl.arange(0, PADDED_CANDIDATES)
        costs = _path_costs(
            row_log_probs, columns, everyone, everyone < num_candidates, num_candidates, DEPTH
        )
        if LENGTH > 0:
            row_tokens, row_chain = tokens + req * NUM_COLUMNS, chain_tokens + req * LENGTH
            match = tl.load(chain_matches + req)
            row_costs = chain_costs + match * LENGTH
            is_spelt, all_depths = _spelt(
                row_tokens, row_chain, columns, everyone, num_candidates, match, DEPTH, LENGTH
            )
            shared = tl.max(tl.where(is_spelt, all_depths, 0), 0)
            costs, _ = _merged_costs(
                costs, is_spelt, all_depths, everyone, num_candidates, shared, row_costs, LENGTH
            )
        chosen = smallest(
            costs, scratch + req * NUM_NODES, NUM_NODES, PADDED_CANDIDATES, PADDED_NODES
        )
        # Their places by cost; chosen is in ascending order, which settles equal costs.
        is_path = is_node & (chosen < num_candidates)
        costs = _path_costs(row_log_probs, columns, chosen, is_path, num_candidates, DEPTH)
        if LENGTH > 0:
            is_spelt, chosen_depths = _spelt(
                row_tokens, row_chain, columns, chosen, num_candidates, match, DEPTH, LENGTH
            )
            costs, is_on_chain = _merged_costs(
                costs, is_spelt, chosen_depths, chosen, num_candidates, shared, row_costs, LENGTH
            )
        row = ranks_of(costs, PADDED_NODES) + 1
        column = tl.zeros([PADDED_NODES], tl.int32)
        parent = tl.zeros([PADDED_NODES], tl.int32)
        depth = tl.zeros([PADDED_NODES], tl.int32)
        mask = tl.full([PADDED_NODES], 1, tl.int64)
        above = tl.zeros([PADDED_NODES], tl.int32)
        for level in tl.static_range(DEPTH):
            place = level * num_candidates + chosen
            ancestor = tl.load(ancestors + place, mask=is_path, other=-1)
            is_there = ancestor >= 0
            is_it = (ancestor[:, None] == chosen[None, :]) & is_there[:, None]
            ancestor_row = tl.sum(tl.where(is_it, row[None, :], 0), 1)
            bit = tl.full([PADDED_NODES], 1, tl.int64) << ancestor_row.to(tl.int64)
            mask = tl.where(is_there, mask | bit, mask)
            parent = tl.where(is_there, above, parent)
            depth = tl.where(is_there, level + 1, depth)
            own_column = tl.load(columns + place, mask=is_there, other=0)
            column = tl.where(is_there, own_column, column)
            above = ancestor_row
        if LENGTH > 0:
            # Links follow whatever is on the chain above them, the heads' part first.
            is_link = is_on_chain & (chosen >= num_candidates)
            depth = tl.where(is_link, chosen_depths, depth)
            link_place = tl.where(is_link, chosen_depths - 1, link_place)
            is_above = (is_link[:, None] & is_on_chain[None, :]) & (
                chosen_depths[None, :] <= chosen_depths[:, None]
            )
            bits = tl.full([PADDED_NODES], 1, tl.int64) << row.to(tl.int64)
            mask += tl.sum(tl.where(is_above, bits[None, :], 0), 1)
            is_parent = is_above & (chosen_depths[None, :] == chosen_depths[:, None] - 1)
            parent += tl.sum(tl.where(is_parent, row[None, :], 0), 1)
    token = tl.load(tokens + req * NUM_COLUMNS + column, mask=is_node, other=0)
    if LENGTH > 0:
        is_link = link_place >= 0
        link = tl.load(chain_tokens + req * LENGTH + link_place, mask=is_link, other=0)
        token = tl.where(is_link, link, token)
    tl.store(out + req * out_stride + row - 1, token, mask=is_node)
    # Row 0 is the root of every tree and stays as it is.
    is_written = nodes < tl.where(is_request, NUM_NODES, 0)
    tl.store(parents + slot * parents_stride + row, parent, mask=is_written)
    tl.store(depths + slot * depths_stride + row, depth, mask=is_written)
    tl.store(masks + slot * masks_stride + row, mask, mask=is_written)


def best_tree(
    out: torch.Tensor,
    tables: TreeTables,
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    slots: torch.Tensor,
    candidates: Candidates,
    fixed: FixedTree,
    *,
    chains: Chains | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Give every request the tree of its N likeliest nodes, likeliest first.

    A node is as likely as the product of its heads' probabilities along its path, the heads
    being independent (paper, section 2.3.3, with a step's own probabilities in place of
    measured accuracies).  A child is never likelier than its parent and stands behind it, so
    every prefix of the nodes is a tree, the best one of its size among the candidates.
    Among equally likely nodes the candidate with the lower index comes first; a log probability
    above 0 counts as 0, NaN as -inf.

    Parameters
    ----------
    out : torch.Tensor
        ``[>= R, N]`` int64. Draft token of every node.
    tables : TreeTables
        ``[S, W]`` each, W = N + 1 <= 64; the rows of the batch's slots are rewritten but for
        row 0, the root.
    tokens : torch.Tensor
        ``[>= R, K, T]`` int64, contiguous: as ``top_tokens`` writes them.
    log_probs : torch.Tensor
        ``[>= R, K, T]`` float32, contiguous.
    slots : torch.Tensor
        ``[R]`` int64 or int32. Batch row -> request slot; negative: no request (padding), its
        tokens are those of the fixed tree and no table is touched.
    candidates : Candidates
        N .. 4096 of them; with every path that has fewer than N paths of no larger ranks above
        or beside it, the tree is the best one of all.
    fixed : FixedTree
        Tree of the slots that it names.
    chains : Chains, optional
        A path of each request beside the heads', by ``lookup_chain``: its nodes compete with the
        heads' at their own costs, and where both have a node it stands once, at the lower cost.
    scratch : torch.Tensor, optional
        ``[>= R * N]`` int32; allocated when missing.

    Examples
    --------
    Two heads with log probabilities ``[[-0.1, -2.4], [-0.7, -0.9]]``, N = 3: nodes ``(0)``,
    ``(0, 0)`` at -0.8 and ``(0, 1)`` at -1.0, that is parents ``-1 0 1 1``; node ``(1)`` at -2.4
    would be the fourth.
    """
    check_best_tree(
        out, tables, tokens, log_probs, slots, candidates, fixed, chains, scratch
    )
    check_runnable("log_probs", log_probs, _best_tree_kernel)
    num_reqs, num_nodes = slots.shape[0], out.shape[1]
    if num_reqs == 0:
        return
    if scratch is None:
        scratch = torch.empty(num_reqs * num_nodes, dtype=torch.int32, device=out.device)
    depth, num_candidates = candidates.columns.shape
    length = 0 if chains is None else chains.tokens.shape[1]
    _best_tree_kernel[(num_reqs,)](
        out, *tables, scratch, tokens, log_probs, slots, *candidates, *fixed,
        *(chains or (None, None, None)),
        out.stride(0), *(table.stride(0) for table in tables), num_candidates,
        DEPTH=depth, LENGTH=length, NUM_COLUMNS=tokens.shape[1] * tokens.shape[2],
        NUM_NODES=num_nodes, PADDED_NODES=triton.next_power_of_2(num_nodes),
        PADDED_CANDIDATES=triton.next_power_of_2(num_candidates + length), num_warps=_NUM_WARPS,
    )  # fmt: skip
