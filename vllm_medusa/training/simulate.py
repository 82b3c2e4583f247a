"""Exact tokens per step of trees under greedy verification of given answers.

Under greedy verification the target's next tokens are the answer itself, so which nodes get
accepted follows from the rank that each head gives the answer's tokens; no model runs here.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_medusa.tree_candidates import (
    candidate_paths,
    candidate_tables,
    head_ranks,
    head_weights,
)

# Costs that exist at once while trees are chosen: 2**24 take 64 MB.
_COSTS_AT_ONCE = 2**24
# Place of a node that no tree holds.
NOWHERE = 2**31 - 1

Path_ = tuple[int, ...]


@dataclass(frozen=True)
class StepCount:
    """Decode steps and the tokens they produced; the prompt's own first token is left out."""

    steps: int
    tokens: int

    @property
    def tokens_per_step(self) -> float:
        """Accepted nodes plus the bonus token, averaged over steps."""
        return self.tokens / self.steps if self.steps else 0.0


def accepted_depths(
    # [rows, num_heads] int, -1 where the head has no label or missed it
    ranks: np.ndarray,
    paths: Iterable[Path_],
) -> np.ndarray:
    """Length of the longest tree path that equals each row's ranks, [rows] int64.

    >>> accepted_depths(np.array([[0, 1], [2, 0], [0, -1]]), [(0,), (0, 1)]).tolist()
    [2, 0, 1]
    """
    depths = np.zeros(len(ranks), np.int64)
    by_depth: dict[int, list[Path_]] = {}
    for path in paths:
        by_depth.setdefault(len(path), []).append(path)
    base = int(max(ranks.max(initial=0), *(max(p) for ps in by_depth.values() for p in ps), 0)) + 2
    codes = np.zeros(len(ranks), np.int64)
    for depth in range(1, max(by_depth, default=0) + 1):
        codes = codes * base + ranks[:, depth - 1] + 1
        wanted = np.zeros(len(by_depth.get(depth, ())), np.int64)
        for i, path in enumerate(by_depth.get(depth, ())):
            for rank in path:
                wanted[i] = wanted[i] * base + rank + 1
        # A path is in the tree only with all its ancestors, so a hit extends the last one.
        depths[np.isin(codes, wanted) & (depths == depth - 1)] = depth
    return depths


def visited_rows(
    # [rows] int64
    depths: np.ndarray,
    # [num_conversations + 1] int64, conversation -> first row
    offsets: np.ndarray,
) -> tuple[np.ndarray, StepCount]:
    """Rows at which decode steps start, and the step count over all conversations.

    Row ``i`` of an answer stands for "token ``i`` is the newest". A step there accepts
    ``depths[i]`` tokens plus the bonus token and moves to row ``i + depths[i] + 1``; it ends
    with the answer's last token even if the tree held more.
    """
    visited: list[int] = []
    tokens = 0
    depth_list = depths.tolist()
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        row = start
        while row < end - 1:
            visited.append(row)
            row += depth_list[row] + 1
        tokens += max(end - start - 1, 0)
    return np.array(visited, np.int64), StepCount(len(visited), tokens)


def output_depths(
    # [rows] int64, tokens that a step at each row accepts
    depths: np.ndarray,
    # [steps] int64, as visited_rows returns them
    rows: np.ndarray,
    offsets: np.ndarray,
) -> np.ndarray:
    """Accepted tokens of each step that became output, [steps] int64.

    An answer's last step yields its last token as the bonus token, so nodes that hold it, or
    what would follow, do not count.
    """
    ends = offsets[np.searchsorted(offsets, rows, side="right")]
    return np.minimum(depths[rows], ends - rows - 2)


def simulate_budgets(
    ranks: np.ndarray,
    offsets: np.ndarray,
    paths: Sequence[Path_],
    budgets: Sequence[int] = (4, 8, 16, 32, 63),
) -> dict[int, StepCount]:
    """Step counts of the first ``budget`` nodes of a best-first tree, for each budget."""
    return {
        budget: visited_rows(accepted_depths(ranks, paths[:budget]), offsets)[1]
        for budget in budgets
        if budget <= len(paths)
    }


def per_conversation(
    ranks: np.ndarray, offsets: np.ndarray, paths: Sequence[Path_]
) -> list[StepCount]:
    """Step count of each conversation by itself."""
    depths = accepted_depths(ranks, paths)
    return [
        visited_rows(depths[a:b], np.array([0, b - a]))[1] for a, b in itertools.pairwise(offsets)
    ]


def accepted_shares(ranks: np.ndarray, offsets: np.ndarray, paths: Sequence[Path_]) -> list[float]:
    """Share of the decode steps that accept each node, in the order of ``paths``.

    Of what became output, so one plus the shares' sum is tokens per step.
    """
    depths = accepted_depths(ranks, paths)
    rows, _ = visited_rows(depths, offsets)
    counts = dict.fromkeys(paths, 0)
    for row, depth in zip(rows, output_depths(depths, rows, offsets), strict=True):
        path = tuple(int(rank) for rank in ranks[row, :depth])
        for length in range(1, len(path) + 1):
            counts[path[:length]] += 1
    return [count / max(len(rows), 1) for count in counts.values()]


def chosen_places(
    # [rows, num_heads] int, MISSED where wrong
    ranks: np.ndarray,
    # [rows, num_heads, num_ranks] float32, log probabilities of every head's best tokens
    log_probs: np.ndarray,
    num_nodes: int = 63,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Place of every row's right path and its ancestors in the tree chosen there.

    The tree is that of ``tree: dynamic``: the likeliest paths, likeliest first.

    Parameters
    ----------
    ranks, log_probs
        As :func:`vllm_medusa.training.calibrate.rank_labels` returns them.
    num_nodes
        Nodes of the tree.
    weights
        Factor of each head's log probabilities; those that are served without it.

    Returns
    -------
    numpy.ndarray, [rows, num_heads] int64
        Column ``k``: nodes before the right node of depth ``k + 1``; ``num_nodes`` where it is
        not among the first ``num_nodes``.

    Examples
    --------
    Nodes in order: (0), (0, 1), (1); the right path is (0, 1).

    >>> log_probs = np.log(np.array([[[0.6, 0.3], [0.1, 0.8]]], np.float32))
    >>> chosen_places(np.array([[0, 1]]), log_probs, 3, (1, 1)).tolist()
    [[0, 1]]
    """
    num_rows, num_heads, num_ranks = log_probs.shape
    factors = np.array(head_weights(num_heads) if weights is None else weights, np.float32)
    paths = candidate_paths(num_nodes, head_ranks(num_nodes, num_heads, num_ranks))
    columns, _ = candidate_tables(paths, num_heads, num_ranks)
    right = candidates_of(ranks, paths)
    places = np.full((num_rows, num_heads), num_nodes, np.int64)
    at_once = max(1, _COSTS_AT_ONCE // len(paths))
    for start in range(0, num_rows, at_once):
        rows = slice(start, start + at_once)
        flat = (-log_probs[rows] * factors[:, None]).reshape(-1, num_heads * num_ranks)
        costs = np.zeros((len(flat), len(paths)), np.float32)
        for level in columns:
            costs += np.where(level >= 0, flat[:, level], np.float32(0))
        for depth in range(num_heads):
            own = right[rows, depth, None]
            cost = np.take_along_axis(costs, np.maximum(own, 0), 1)
            before = (costs < cost) | ((costs == cost) & (np.arange(len(paths)) < own))
            found = np.minimum(before.sum(1), num_nodes)
            places[rows, depth] = np.where(own[:, 0] >= 0, found, num_nodes)
    return places


def pool_places(
    # [rows, num_heads] int, MISSED where wrong
    ranks: np.ndarray,
    # [rows, nodes] float32, log probability of every node behind its parent
    log_probs: np.ndarray,
    # best-first tree, parents before their children
    paths: Sequence[Path_],
) -> np.ndarray:
    """The same for sequential heads, whose likeliest nodes of a fixed tree are chosen.

    A right node that the tree lacks has the place NOWHERE, beyond any number of nodes.

    >>> log_probs = np.log(np.array([[0.3, 0.6, 0.9]], np.float32))
    >>> pool_places(np.array([[1, -1]]), log_probs, [(0,), (1,), (0, 0)]).tolist()
    [[0, 2147483647]]
    """
    costs = path_costs(log_probs, paths)
    right = candidates_of(ranks, paths)
    places = np.full(ranks.shape, NOWHERE, np.int64)
    for depth in range(ranks.shape[1]):
        own = right[:, depth, None]
        cost = np.take_along_axis(costs, np.maximum(own, 0), 1)
        before = (costs < cost) | ((costs == cost) & (np.arange(len(paths)) < own))
        places[:, depth] = np.where(own[:, 0] >= 0, before.sum(1), NOWHERE)
    return places


def path_costs(
    # [rows, nodes] float32, log probability of every node behind its parent
    log_probs: np.ndarray,
    # parents before their children
    paths: Sequence[Path_],
) -> np.ndarray:
    """Negative log probability of every node's whole path, [rows, nodes] float32.

    >>> log_probs = np.log(np.array([[0.5, 0.25]], np.float32))
    >>> np.exp(-path_costs(log_probs, [(0,), (0, 0)])).round(3).tolist()
    [[0.5, 0.125]]
    """
    index = {path: node for node, path in enumerate(paths)}
    costs = -log_probs
    # A parent's cost is whole before its children's.
    for node, path in enumerate(paths):
        if len(path) > 1:
            costs[:, node] += costs[:, index[path[:-1]]]
    return costs


def candidates_of(ranks: np.ndarray, paths: Sequence[Path_]) -> np.ndarray:
    """[rows, num_heads] index of each row's path of every length among ``paths``, or -1."""
    found = np.full(ranks.shape, -1, np.int64)
    index = {path: place for place, path in enumerate(paths)}
    for depth in range(1, ranks.shape[1] + 1):
        distinct, inverse = np.unique(ranks[:, :depth], axis=0, return_inverse=True)
        places = [index.get(tuple(int(rank) for rank in path), -1) for path in distinct]
        found[:, depth - 1] = np.array(places, np.int64)[inverse.reshape(-1)]
    return found


def simulate_chosen(
    ranks: np.ndarray,
    log_probs: np.ndarray,
    offsets: np.ndarray,
    budgets: Sequence[int] = (4, 8, 16, 32, 63),
    weights: Sequence[float] | None = None,
) -> dict[int, StepCount]:
    """Step counts of trees chosen at every step, for each budget; arguments as above."""
    places = chosen_places(ranks, log_probs, max(budgets), weights)
    return {
        # A path is never before its ancestors, so those within the budget are a path.
        budget: visited_rows((places < budget).sum(1), offsets)[1]
        for budget in budgets
    }
