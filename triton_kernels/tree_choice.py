"""Choose every request's next tree: the n likeliest nodes, on the device, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable
from .checks_draft import check_best_tree
from .selection import ranks_of, smallest
from .tree_types import Candidates, FixedTree, TreeTables

_NUM_WARPS = 8

_NEVER: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # above the bits of every cost


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
    out_stride,
    parents_stride,
    depths_stride,
    masks_stride,
    num_candidates,
    DEPTH: tl.constexpr,
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
        chosen = smallest(
            costs, scratch + req * NUM_NODES, NUM_NODES, PADDED_CANDIDATES, PADDED_NODES
        )
        # Their places by cost; chosen is in ascending order, which settles equal costs.
        costs = _path_costs(row_log_probs, columns, chosen, is_node, num_candidates, DEPTH)
        row = ranks_of(costs, PADDED_NODES) + 1
        column = tl.zeros([PADDED_NODES], tl.int32)
        parent = tl.zeros([PADDED_NODES], tl.int32)
        depth = tl.zeros([PADDED_NODES], tl.int32)
        mask = tl.full([PADDED_NODES], 1, tl.int64)
        above = tl.zeros([PADDED_NODES], tl.int32)
        for level in tl.static_range(DEPTH):
            place = level * num_candidates + chosen
            ancestor = tl.load(ancestors + place, mask=is_node, other=-1)
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
    token = tl.load(tokens + req * NUM_COLUMNS + column, mask=is_node, other=0)
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
    scratch : torch.Tensor, optional
        ``[>= R * N]`` int32; allocated when missing.

    Examples
    --------
    Two heads with log probabilities ``[[-0.1, -2.4], [-0.7, -0.9]]``, N = 3: nodes ``(0)``,
    ``(0, 0)`` at -0.8 and ``(0, 1)`` at -1.0, that is parents ``-1 0 1 1``; node ``(1)`` at -2.4
    would be the fourth.
    """
    check_best_tree(out, tables, tokens, log_probs, slots, candidates, fixed, scratch)
    check_runnable("log_probs", log_probs, _best_tree_kernel)
    num_reqs, num_nodes = slots.shape[0], out.shape[1]
    if num_reqs == 0:
        return
    if scratch is None:
        scratch = torch.empty(num_reqs * num_nodes, dtype=torch.int32, device=out.device)
    depth, num_candidates = candidates.columns.shape
    _best_tree_kernel[(num_reqs,)](
        out, *tables, scratch, tokens, log_probs, slots, *candidates, *fixed,
        out.stride(0), *(table.stride(0) for table in tables), num_candidates,
        DEPTH=depth, NUM_COLUMNS=tokens.shape[1] * tokens.shape[2], NUM_NODES=num_nodes,
        PADDED_NODES=triton.next_power_of_2(num_nodes),
        PADDED_CANDIDATES=triton.next_power_of_2(num_candidates), num_warps=_NUM_WARPS,
    )  # fmt: skip
