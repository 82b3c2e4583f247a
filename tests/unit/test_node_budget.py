"""Nodes of a step from what steps cost and what is accepted."""

from __future__ import annotations

import pytest

from vllm_medusa.node_budget import NodeBudget, PricedLookup
from vllm_medusa.step_costs import StepCosts

FREQUENCIES = [0.6, 0.3, 0.2, 0.1]
# A step of this machine: 1 ms and 0.1 ms for every row beyond 8, and keys cost with every row.
SECONDS = {
    (rows, requests, context): 1.0
    + 0.1 * max(0, rows * requests - 8)
    + context * rows * requests * 1e-5
    for rows in (1, 2, 3, 5)
    for requests in (1, 2, 4, 8, 16)
    for context in (0, 1000)
}


def budget(**changes) -> NodeBudget:
    return NodeBudget(**{"frequencies": FREQUENCIES, "choices": (0, 1, 2, 4),
                         "costs": StepCosts(SECONDS)} | changes)  # fmt: skip


def brute_force(share: float, requests: int, context: int) -> int:
    """Best of the choices, from the formula that SECONDS was made with."""

    def rate(nodes: int) -> float:
        rows = (nodes + 1) * requests
        seconds = 1.0 + 0.1 * max(0, rows - 8) + context * rows * 1e-5
        return (1 + share * sum(FREQUENCIES[:nodes])) / seconds

    return max((0, 1, 2, 4), key=rate)


@pytest.mark.parametrize("context", [0, 500, 1000, 8000])
@pytest.mark.parametrize("requests", [1, 2, 4, 8, 16])
def test_choice_is_the_best_of_all(requests, context):
    chosen = budget()
    assert chosen.choose(requests, context) == brute_force(chosen.share, requests, context)


def test_batches_between_measured_ones_are_interpolated():
    costs = StepCosts(SECONDS)
    assert costs.of(5, 3, 0) == pytest.approx((SECONDS[5, 2, 0] + SECONDS[5, 4, 0]) / 2)


def test_no_choice_for_a_batch_larger_than_any_measured():
    assert budget().choose(17, 0) is None
    lookup = PricedLookup(budget(), [4] * 20)
    assert [lookup[n] for n in range(17, 20)] == [4, 4, 4]


def test_lookup_is_priced_when_asked_and_looked_at_again():
    seen = budget()
    lookup = PricedLookup(seen, [4] * 17)
    lookup.look_again(1000)
    assert lookup[1] == 4
    for _ in range(20000):
        seen.observe(4, 0)
    assert lookup[1] == 4, "prices hold until the next look"
    lookup.look_again(1000)
    assert lookup[1] == 0


def test_lookup_changes_sizes_that_were_measured():
    lookup = PricedLookup(budget(), [4] * 17)
    schedule = [lookup[n] for n in range(17)]
    assert schedule[1] == 4, "free rows"
    assert schedule[16] == 0, "every row beyond 8 costs a tenth of a step"
    # Where requests share the same free rows, more of them never get more nodes each.
    assert schedule[1:] == sorted(schedule[1:], reverse=True)


def test_nothing_accepted_ends_in_plain_decoding():
    """Free rows are still not free of their keys: with nothing accepted no node pays."""
    unlucky = budget()
    assert unlucky.choose(1, 1000) == 4
    for _ in range(20000):
        unlucky.observe(4, 0)
    assert unlucky.share < 0.01
    assert unlucky.choose(1, 1000) == 0


def test_a_tree_is_tried_again_in_the_end():
    seen = budget()
    for _ in range(20000):
        seen.observe(4, 0)
    lookup = PricedLookup(seen, [0] * 17)
    lookup.look_again(1000)
    assert lookup[1] == 0
    for _ in range(400):
        lookup.look_again(1000)
    assert lookup[1] == 4


def test_share_follows_what_is_accepted():
    seen = budget()
    for _ in range(20000):
        seen.observe(2, 1)
    assert seen.share == pytest.approx(1 / 0.9, rel=1e-3)
    before = seen.share
    seen.observe(0, 0)
    assert seen.share == before, "plain steps say nothing of the tree"


def test_a_gain_within_noise_changes_nothing():
    costs = StepCosts({(1, 1, 0): 1.0, (2, 1, 0): 1.0 + 0.9 * 0.6 - 0.002})
    chosen = budget(costs=costs)
    assert chosen.rate(1, 1, 0) > chosen.rate(0, 1, 0)
    assert chosen.choose(1, 0, current=0) == 0
    assert chosen.choose(1, 0) == 1


def test_costs_survive_their_file(tmp_path):
    costs = StepCosts(SECONDS)
    costs.save(tmp_path / "new" / "steps.json")
    assert StepCosts.load(tmp_path / "new" / "steps.json") == costs
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["steps.json"]


def test_noise_never_makes_a_longer_context_cheaper():
    costs = StepCosts({(1, 1, 500): 2.0, (1, 1, 1000): 1.0})
    assert [costs.of(1, 1, context) for context in (0, 500, 10000)] == [2.0, 2.0, 2.0]


def test_short_contexts_cost_what_the_shortest_measured_does():
    costs = StepCosts({(1, 1, 500): 2.0, (1, 1, 1000): 4.0})
    assert [costs.of(1, 1, context) for context in (0, 500, 750, 2000)] == [2.0, 2.0, 3.0, 8.0]
