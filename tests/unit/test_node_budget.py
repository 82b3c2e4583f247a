"""Nodes of a step from what steps cost and what is accepted."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from vllm_medusa.node_budget import NodeBudget, PricedLookup
from vllm_medusa.scheduler import STEPS_PER_LOOK, STEPS_PER_TRY
from vllm_medusa.served_costs import ServedCosts
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
                         "costs": ServedCosts(StepCosts(SECONDS))} | changes)  # fmt: skip


def test_histories_add_more_the_wider_a_tree_is():
    """1.17 and 1.22 of what calibration promised of 1 and 3 nodes: 0.05 more a doubling of rows."""
    plain, both = budget(), budget(lookup=True)
    assert both.promised[0] == 0.0
    assert both.promised[1] == pytest.approx(1.17 * plain.promised[1])
    assert both.promised[3] == pytest.approx(1.22 * plain.promised[3])
    shares = [b / p for b, p in zip(both.promised[1:], plain.promised[1:], strict=True)]
    assert shares == sorted(shares)


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
    for nodes in (4, 2, 1) * 5000:
        seen.observe(nodes, 0)
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
    unlucky, draw = budget(), random.Random(0)
    chosen = served(unlucky, {0: 0, 1: 0, 2: 0, 4: 0}, 1, 1000, draw, context=1000)
    assert chosen[0] == 4
    late = chosen[50:]
    seconds = sum(SECONDS[n + 1, 1, 1000] for n in late)
    assert len(late) * SECONDS[1, 1, 1000] / seconds > 0.99
    assert set(late) > {0}, "a tree is tried again in the end"


def test_share_follows_what_is_accepted():
    seen = budget()
    for _ in range(20000):
        seen.observe(2, 1)
    seen.settle()
    assert seen.share == pytest.approx(1 / 0.9, rel=1e-2)
    before = seen.share
    seen.observe(0, 0)
    seen.settle()
    assert seen.share == before, "plain steps say nothing of the tree"


def test_a_gain_within_noise_changes_nothing():
    costs = ServedCosts(StepCosts({(1, 1, 0): 1.0, (2, 1, 0): 1.0 + 0.9 * 0.6 - 0.002}))
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


WIDTHS = [0, 1, 3, 7, 15, 31, 63]
# What calibration promised, and what several kinds of traffic accept.
PROMISED = {1: 0.5, 3: 0.8, 7: 1.0, 15: 1.2, 31: 1.35, 63: 1.5}
TRAFFIC = {
    "as promised": PROMISED,
    "a third": {n: value / 3 for n, value in PROMISED.items()},
    "prompt lookup": {1: 0.75, 3: 1.4, 7: 1.9, 15: 2.3, 31: 2.55, 63: 2.7},
    "small ones better": {1: 0.8, 3: 1.3, 7: 1.4, 15: 1.45, 31: 1.5, 63: 1.5},
    "large ones better": {1: 0.25, 3: 0.45, 7: 0.7, 15: 1.1, 31: 1.5, 63: 1.9},
    "nothing": dict.fromkeys(PROMISED, 0.01),
}


def traffic_frequencies() -> list[float]:
    """A node's share, equal between two widths."""
    steps = [(0, 0.0), *PROMISED.items()]
    return [
        (value - before) / (nodes - fewer)
        for (fewer, before), (nodes, value) in itertools.pairwise(steps)
        for _ in range(nodes - fewer)
    ]


def traffic_costs(per_row: float, free: int) -> StepCosts:
    """A step takes 1, and so much more for every row beyond the free ones."""
    return StepCosts(
        {
            (n + 1, requests, 0): 1.01 * (n > 0) + (n == 0)
            + per_row * max(0, (n + 1) * requests - free)
            for n in WIDTHS
            for requests in (1, 4, 16, 64, 256)
        }
    )  # fmt: skip


def served(
    budget: NodeBudget,
    accepts: dict,
    requests: int,
    looks: int,
    draw,
    context: float = 0,
    costs: StepCosts | None = None,
) -> list[int]:
    """Nodes between two looks; each step accepts 0 to 6 tokens, on average what the traffic does.

    It takes what ``costs`` says, within 5 %, or what was measured.
    """
    chosen, lookup = [], PricedLookup(budget, [max(accepts)] * (requests + 1))
    for _ in range(looks):
        lookup.look_again(context)
        current = lookup[requests]
        chosen.append(current)
        for _ in range(STEPS_PER_LOOK if costs is not None else 0):
            seconds = costs.of(current + 1, requests, context) * draw.uniform(0.95, 1.05)
            budget.costs.observe(current + 1, requests, context, seconds)
        # As many observations of a large batch change nothing any more.
        for _ in range(STEPS_PER_LOOK * min(requests, 4) if current else 0):
            budget.observe(current, sum(draw.random() < accepts[current] / 6 for _ in range(6)))
    return chosen


def share_of_best(chosen: list[int], accepts: dict, costs: StepCosts, requests: int) -> float:
    """Tokens per second against those of the best width."""
    rates = {n: (1 + accepts[n]) / costs.of(n + 1, requests, 0) for n in WIDTHS}
    tokens = sum(1 + accepts[n] for n in chosen)
    seconds = sum(costs.of(n + 1, requests, 0) for n in chosen)
    # Plain decoding must not be lost to, whatever the best is.
    assert tokens / seconds > 0.99 * rates[0]
    return tokens / seconds / max(rates.values())


@pytest.mark.parametrize("requests", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("kind", TRAFFIC)
def test_streams_end_at_the_width_with_most_tokens_per_second(kind, requests):
    """At least 98 % of the best width's tokens per second, and 99 % of plain decoding's."""
    accepts = {0: 0.0} | TRAFFIC[kind]
    costs = traffic_costs(per_row=0.004, free=100)
    budget = NodeBudget(traffic_frequencies(), WIDTHS, ServedCosts(costs))
    chosen = served(budget, accepts, requests, 800, random.Random(requests))
    assert share_of_best(chosen[200:], accepts, costs, requests) > 0.98


@pytest.mark.parametrize("wrong", [{64: 1.3}, {8: 0.7}, {1: 1.2, 16: 0.8}], ids=str)
@pytest.mark.parametrize("requests", [1, 4, 64])
@pytest.mark.parametrize("kind", ["as promised", "prompt lookup"])
def test_times_that_were_wrong_at_start_are_mended_in_service(kind, requests, wrong):
    """A step of some widths was timed as dearer or cheaper than it is."""
    accepts = {0: 0.0} | TRAFFIC[kind]
    true = traffic_costs(per_row=0.004, free=100)
    timed = StepCosts({key: t * wrong.get(key[0], 1.0) for key, t in true.seconds.items()})
    budget = NodeBudget(traffic_frequencies(), WIDTHS, ServedCosts(timed))
    chosen = served(budget, accepts, requests, 800, random.Random(requests), costs=true)
    assert share_of_best(chosen[200:], accepts, true, requests) > 0.98


def test_a_width_is_tried_for_what_it_teaches_and_not_for_long():
    """What is not known is taken for better than it is, until it is known."""
    costs, draw = traffic_costs(per_row=0.004, free=100), random.Random(1)
    budget = NodeBudget(traffic_frequencies(), WIDTHS, ServedCosts(costs))
    accepts, lookup = {0: 0.0} | PROMISED, PricedLookup(budget, [63] * 9)
    tries = {}
    for _ in range(100):
        lookup.look_again(0)
        assert not budget.is_trying
        current = lookup[8]
        tries.setdefault(current, []).append(budget.is_trying)
        for _ in range(STEPS_PER_TRY if budget.is_trying else STEPS_PER_LOOK):
            budget.costs.observe(current + 1, 8, 0, costs.of(current + 1, 8, 0))
            for _ in range(8 if current else 0):
                accepted = sum(draw.random() < accepts[current] / 6 for _ in range(6))
                budget.observe(current, accepted)
    best = max(WIDTHS, key=lambda n: (1 + accepts[n]) / costs.of(n + 1, 8, 0))
    others = [is_try for nodes, all_ in tries.items() if nodes != best for is_try in all_]
    assert sum(tries[best]) < 0.2 * len(tries[best])
    assert sum(others) > 0.5 * len(others) > 0
    assert len(tries[best]) > 60


def test_the_choice_follows_the_traffic():
    """From traffic that repeats its prompt to traffic for which no node pays, and back."""
    costs, draw = traffic_costs(per_row=0.004, free=100), random.Random(3)
    budget = NodeBudget(traffic_frequencies(), WIDTHS, ServedCosts(costs))
    lucky, unlucky = TRAFFIC["prompt lookup"], TRAFFIC["nothing"]
    assert statistics.median(served(budget, lucky, 64, 200, draw)[100:]) == 1
    assert statistics.median(served(budget, unlucky, 64, 400, draw)[200:]) == 0
    assert statistics.median(served(budget, lucky, 64, 800, draw)[400:]) == 1


def test_no_more_is_accepted_than_a_tree_is_deep():
    seen = budget(depths=[0, 1, 1, 2, 2])
    for _ in range(2000):
        seen.observe(4, 3)
    seen.settle()
    assert seen.accepted(4) == 2.0 and seen.accepted(1) == 1.0
    assert seen.share > 2


def test_widths_learn_from_the_level_and_then_from_themselves():
    seen = budget()
    assert seen.accepted(2) == pytest.approx(0.9 * 0.9)
    for index in range(3000):
        seen.observe(4, index % 2)
    seen.settle()
    # 0.5 of the 1.2 tokens that were promised of four nodes, so 0.375 of 0.9 of two nodes.
    assert seen.accepted(4) == pytest.approx(0.5, rel=0.02)
    assert seen.accepted(2) == pytest.approx(0.375, rel=0.02)
    for _ in range(64):
        seen.observe(2, 1)
    seen.settle()
    assert 0.45 < seen.accepted(2) < 1.0
    # A width that runs on alone tells nothing more of itself, but of the traffic.
    for _ in range(3000):
        seen.observe(2, 1)
    assert seen.accepted(2) < 1.0, "until the next look"
    seen.settle()
    assert seen.accepted(2) == pytest.approx(1.0, rel=0.02)
    assert 0.4 < seen.accepted(4) < 1.2


LEVELS = (0.3, 1.6)


@pytest.mark.parametrize("requests", [1, 4, 64])
@pytest.mark.parametrize("looks_per_text", [2, 9])
def test_a_text_that_repeats_itself_is_not_taken_for_a_better_width(looks_per_text, requests):
    """What is accepted changes fivefold with the text, and threefold with the width."""
    accepts, draw = {0: 0.0} | PROMISED, random.Random(requests)
    costs = traffic_costs(per_row=0.004, free=100)
    budget = NodeBudget(traffic_frequencies(), WIDTHS, ServedCosts(costs))
    lookup, chosen = PricedLookup(budget, [63] * (requests + 1)), []
    for look in range(600):
        level = LEVELS[look // looks_per_text % 2]
        lookup.look_again(0)
        nodes = lookup[requests]
        chosen.append((nodes, level))
        for _ in range(STEPS_PER_LOOK * min(requests, 4) if nodes else 0):
            budget.observe(nodes, sum(draw.random() < level * accepts[nodes] / 6 for _ in range(6)))

    def rate(widths: list[int]) -> float:
        pairs = zip(widths, chosen[100:], strict=True)
        tokens = sum(1 + level * accepts[n] for n, (_, level) in pairs)
        return tokens / sum(costs.of(n + 1, requests, 0) for n in widths)

    late = [nodes for nodes, _ in chosen[100:]]
    best = max(rate([nodes] * len(late)) for nodes in WIDTHS)
    assert rate(late) > 0.96 * best
