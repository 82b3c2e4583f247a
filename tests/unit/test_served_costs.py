"""What steps take in service corrects what was measured at start."""

from __future__ import annotations

import pytest

from vllm_medusa.decayed_mean import RELAXATION
from vllm_medusa.served_costs import LEAST_RATIO, MOST_RATIO, ServedCosts, StepClock
from vllm_medusa.step_costs import StepCosts

MEASURED = StepCosts({(rows, requests, 0): 1.0 for rows in (1, 4, 8) for requests in (1, 8)})


def learnt(rows: int, requests: int, seconds: float, steps: int = 3000) -> ServedCosts:
    costs = ServedCosts(MEASURED)
    for _ in range(steps):
        costs.observe(rows, requests, 0, seconds)
    return costs


def test_before_any_step_costs_are_those_measured():
    assert ServedCosts(MEASURED).of(4, 1, 0) == 1.0


def test_a_width_takes_what_its_steps_took():
    # 512 / (512 + 16) of the evidence is its own, the rest half as far away.
    assert learnt(4, 1, 1.5).of(4, 1, 0) == pytest.approx(1.5, rel=0.01)


def test_what_slows_one_width_is_expected_of_the_others():
    costs = learnt(4, 1, 1.5)
    assert costs.of(8, 1, 0) == pytest.approx(costs.of(1, 1, 0))
    assert costs.of(8, 1, 0) == pytest.approx(1.5, rel=0.02)


def test_batches_of_another_size_are_another_matter():
    assert learnt(4, 1, 1.5).of(4, 8, 0) == 1.0


@pytest.mark.parametrize(("seconds", "ratio"), [(100.0, MOST_RATIO), (0.0, LEAST_RATIO)])
def test_a_step_that_was_interrupted_counts_no_more_than_twice(seconds, ratio):
    assert learnt(4, 1, seconds).of(4, 1, 0) == pytest.approx(ratio, rel=0.05)


def test_steps_that_were_not_measured_are_no_choice():
    costs = ServedCosts(MEASURED)
    costs.observe(5, 1, 0, 1.0)
    assert costs.of(5, 1, 0) is None and costs.of(4, 9, 0) is None


def test_a_width_that_does_not_run_falls_back_to_the_others():
    costs = learnt(4, 1, 1.8)
    for _ in range(2000):
        costs.observe(8, 1, 0, 1.0)
    before = costs.of(4, 1, 0)
    # e^-4 of its 512 steps, about 9, are left of what it knew.
    for _ in range(int(4 / (1 - RELAXATION))):
        costs.relax()
        for _ in range(32):
            costs.observe(8, 1, 0, 1.0)
    assert before > 1.7 and costs.weight(4, 1) < 0.5 < costs.weight(8, 1)
    assert costs.of(4, 1, 0) < 1.4 and costs.of(8, 1, 0) == pytest.approx(1.0, rel=0.05)


def test_a_step_lasts_from_output_to_output_unless_nothing_ran():
    clock = StepClock()
    assert [clock.tick(now) for now in (1.0, 1.5, 3.5)] == [None, 0.5, 2.0]
    clock.stop()
    assert [clock.tick(now) for now in (9.0, 9.25)] == [None, 0.25]
