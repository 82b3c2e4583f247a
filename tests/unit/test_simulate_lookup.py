"""Simulated trees of heads' and history's nodes against trees that are built node by node."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_medusa.prompt_lookup import SHARES, chain_costs
from vllm_medusa.training.calibrate import HeadRanks
from vllm_medusa.tree_candidates import candidate_paths, head_ranks, head_weights

HEADS, RANKS, LENGTH, ROWS = 3, 6, 5, 120
# The answer's next tokens; the heads' wrong ones are 100 and up, the history's 1000 and up.
LABELS = np.arange(1, LENGTH + 1)


pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def made():
    """Ranks and log probabilities of heads that are right now and then, and continuations."""
    from simulate_lookup import Continuations

    draw = np.random.default_rng(0)
    logits = draw.normal(size=(ROWS, HEADS, RANKS + 3)) * 2
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = -np.sort(-log_probs, -1)[..., :RANKS].astype(np.float32)
    ranks = draw.integers(-1, 3, (ROWS, HEADS))
    ranks = HeadRanks(ranks, ranks >= 0, np.array([0, 30, 60, 90, ROWS]), RANKS, log_probs)
    matches = draw.integers(0, 9, ROWS)
    right = np.where(matches > 0, draw.integers(0, LENGTH + 1, ROWS), 0)
    return ranks, Continuations(matches, right, np.ones(ROWS, bool), LENGTH)


def built(ranks, found, row: int, num_nodes: int) -> int:
    """Right nodes in the tree of the cheapest nodes, each node a path of tokens."""
    prices: dict[tuple, float] = {}
    weights = head_weights(HEADS)
    for path in candidate_paths(num_nodes, head_ranks(num_nodes, HEADS, RANKS)):
        tokens = tuple(
            int(LABELS[k]) if rank == ranks.ranks[row, k] else 100 * (k + 1) + rank
            for k, rank in enumerate(path)
        )
        price = sum(
            -weights[k] * float(ranks.log_probs[row, k, rank]) for k, rank in enumerate(path)
        )
        prices[tokens] = price
    if found.matches[row]:
        held = int(found.right[row])
        chain = [int(LABELS[d]) if d < held else 1000 + d for d in range(LENGTH)]
        for depth, price in enumerate(chain_costs(LENGTH)[found.matches[row]], start=1):
            tokens = tuple(chain[:depth])
            prices[tokens] = min(float(price), prices.get(tokens, np.inf))
    chosen = sorted(prices, key=prices.__getitem__)[:num_nodes]
    return sum(tokens == tuple(LABELS[: len(tokens)]) for tokens in chosen)


@pytest.mark.parametrize("num_nodes", [1, 4, 12, 30])
def test_merged_trees_are_those_built_node_by_node(made, num_nodes):
    from simulate_lookup import SERVED, merged_depths

    ranks, found = made
    depths = merged_depths(ranks, found, num_nodes)[SERVED]
    assert depths.tolist() == [built(ranks, found, row, num_nodes) for row in range(ROWS)]


def test_prices_come_from_the_other_half(made):
    from simulate_lookup import count_shares

    _, found = made
    rows = np.arange(ROWS) < 60
    found.matches[:60], found.matches[60:] = 2, 5
    found.right[:60] = np.arange(60) % 3
    shares = count_shares(found, rows)
    assert shares[1] == pytest.approx(2 / 3)
    assert shares[4] == SHARES[4], "too few of them there"


def test_continuations_are_periodic_and_end_with_the_answer():
    from simulate_lookup import find_continuations

    found = find_continuations([([1, 2], [3, 3, 3, 3]), ([7], [8])], 16)
    assert found.matches.tolist() == [0, 1, 2, 3, 0]
    assert found.right.tolist() == [0, 2, 1, 0, 0]
    assert found.has_next.tolist() == [True, True, True, False, False]


def test_records_hold_every_kind(made):
    import simulate_trees

    from vllm_medusa.tree import TokenTree

    ranks, _ = made
    draw = np.random.default_rng(1)
    pairs = [([1, 2, 3], draw.integers(0, 5, 30).tolist()) for _ in range(4)]
    rows = simulate_trees.compare(ranks, TokenTree.from_widths([3, 3, 3]), pairs)
    assert [row["nodes"] for row in rows] == list(simulate_trees.BUDGETS)
    assert len(rows[0]) == 6
    lookup = [row["chosen, lookup, held-out prices"]["tokens_per_step"] for row in rows]
    assert lookup == sorted(lookup)
