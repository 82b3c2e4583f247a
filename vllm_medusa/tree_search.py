"""Best-first tree search over head accuracies (paper section 2.3.3)."""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Sequence
from itertools import accumulate

from vllm_medusa.tree_paths import MAX_NODES, TreePath

# Exclusive top-i accuracies of a head are parts of one whole; rounding of a
# stored table may push their sum this far above 1.
ACCURACY_SUM_SLACK = 1e-3

# [num_heads][num_ranks]: how often choice i of head k, and no other, is right.
AccuracyTable = list[list[float]]


def check_accuracies(accuracies: Sequence[Sequence[float]]) -> AccuracyTable:
    """Return the accuracies as floats, or raise ValueError naming the bad entry."""
    table = [[float(value) for value in row] for row in accuracies]
    if not table or not all(table):
        raise ValueError(
            f"accuracies: found {table}, expected one non-empty row of floats per head; measure "
            "them with `vllm-medusa calibrate`"
        )
    for head, row in enumerate(table, start=1):
        for rank, value in enumerate(row):
            # A NaN fails both comparisons and is caught too.
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"accuracies: head {head} rank {rank} is {value}, expected 0..1; these are "
                    "probabilities, not percentages or logits"
                )
        if math.fsum(row) > 1.0 + ACCURACY_SUM_SLACK:
            raise ValueError(
                f"accuracies: head {head} sums to {math.fsum(row):.4f}, expected at most 1; "
                "pass how often exactly choice i is right (top-i minus top-(i-1) accuracy), "
                "not the cumulative top-i accuracy"
            )
    return table


def best_first_paths(table: AccuracyTable, num_nodes: int) -> tuple[TreePath, ...]:
    """Return the ``num_nodes`` most valuable nodes, best first, parents before children."""
    reachable = sum(accumulate((len(row) for row in table), operator.mul))
    limit = min(MAX_NODES, reachable)
    if not 1 <= num_nodes <= limit:
        raise ValueError(
            f"num_nodes: found {num_nodes}, expected 1..{limit} (at most {MAX_NODES} nodes a "
            f"tree; the accuracies of {len(table)} heads allow {reachable}); change the budget "
            "or measure more ranks"
        )
    # Per head its ranks, most accurate first. With siblings visited in that
    # order the heap needs only two successors of a popped node: its next sibling
    # and its first child.
    order = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in table]

    def entry(path: TreePath, place: int, parent_value: float):
        rank = order[len(path)][place]
        value = parent_value * table[len(path)][rank]
        # Equal values: shallow nodes first, so that a parent precedes its child.
        return (-value, len(path) + 1, (*path, rank), place, parent_value)

    heap = [entry((), 0, 1.0)]
    chosen: list[TreePath] = []
    while len(chosen) < num_nodes:
        negative_value, depth, path, place, parent_value = heapq.heappop(heap)
        chosen.append(path)
        if place + 1 < len(order[depth - 1]):
            heapq.heappush(heap, entry(path[:-1], place + 1, parent_value))
        if depth < len(table):
            heapq.heappush(heap, entry(path, 0, -negative_value))
    return tuple(chosen)


def path_value(paths: Sequence[TreePath], table: AccuracyTable) -> float:
    """Return the expected tokens per step: 1 + the sum of every node's value."""
    total = 1.0
    for path in paths:
        value = 1.0
        for depth, rank in enumerate(path, start=1):
            if depth > len(table) or rank >= len(table[depth - 1]):
                raise ValueError(
                    f"accuracies: path {list(path)} uses rank {rank} of head {depth}, which the "
                    "table does not hold; measure more heads or ranks, or cut the tree"
                )
            value *= table[depth - 1][rank]
        total += value
    return total
