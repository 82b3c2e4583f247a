"""The scheduler's handling of drafts: late ones, placeholders, budgets of requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_medusa.scheduler import MOST_ROWS_BESIDE, TreeSchedulerMixin
from vllm_medusa.served_costs import StepClock


class Scheduler(TreeSchedulerMixin):
    """The mixin without vLLM's scheduler below it."""

    def __init__(self, requests: dict, budgets: dict | None = None):
        self.requests = requests
        self._node_budgets = budgets or {}


def request(prefill: bool = False, finished: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        is_prefill_chunk=prefill, is_finished=lambda: finished, spec_token_ids=[8, 8]
    )


def drafts(**tokens: list[int]) -> SimpleNamespace:
    return SimpleNamespace(req_ids=list(tokens), draft_token_ids=list(tokens.values()))


def test_drafts_are_taken_whole_and_cut_to_budgets():
    requests = {
        "free": request(), "two": request(), "off": request(),
        "prompt": request(prefill=True), "done": request(finished=True),
    }  # fmt: skip
    scheduler = Scheduler(requests, {"two": 2, "off": 0, "gone": 5})
    names = [*requests, "gone"]
    scheduler.update_draft_token_ids(drafts(**{name: [1, 2, 3, 4] for name in names}))
    found = {name: requests[name].spec_token_ids for name in requests}
    assert found == {
        "free": [1, 2, 3, 4], "two": [1, 2], "off": [], "prompt": [], "done": [8, 8]
    }  # fmt: skip
    # A request that is no more is forgotten.
    assert scheduler._node_budgets == {"two": 2, "off": 0}


def test_late_drafts_keep_the_scheduled_size():
    output = SimpleNamespace(
        scheduled_spec_decode_tokens={"cut": [-1] * 2, "padded": [-1] * 4, "alone": [-1] * 3}
    )
    Scheduler({}).update_draft_token_ids_in_output(
        drafts(cut=[5, 6, 7], padded=[5, 6], plain=[5, 6]), output
    )
    assert output.scheduled_spec_decode_tokens == {
        "cut": [5, 6], "padded": [5, 6, -1, -1], "alone": [-1] * 3
    }  # fmt: skip
    assert output.num_invalid_spec_tokens == {}


class Costs(list):
    """Remembers what was observed."""

    def observe(self, rows: int, requests: int, context: float, seconds: float) -> None:
        assert context == 500.0 and seconds >= 0
        self.append((rows, requests))


def step(scheduled: dict[str, int], trees: tuple[str, ...] = (), next_nodes: int = 3):
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens={name: [-1] * (scheduled[name] - 1) for name in trees},
        num_spec_tokens_to_schedule=next_nodes,
    )


@pytest.mark.parametrize(
    ("output", "observed"),
    [
        (step({"a": 4, "b": 4}, trees=("a", "b")), [(4, 2)]),
        (step({"a": 4, "new": 30}, trees=("a",)), [(4, 2)]),
        (step({"a": 4, "new": MOST_ROWS_BESIDE + 1}, trees=("a",)), []),
        (step({"a": 4, "own": 2}, trees=("a", "own")), []),
        (step({"a": 1, "b": 1}, next_nodes=0), [(1, 2)]),
        (step({"a": 1, "new": 30}, next_nodes=0), [(1, 2)]),
        (step({"new": 30}), []),
        (step({}, next_nodes=0), []),
    ],
    ids=[
        "trees", "a short prompt beside", "a long prompt beside", "a budget of its own", "plain",
        "plain with a prompt", "prompts before their trees", "nothing scheduled",
    ],
)  # fmt: skip
def test_time_of_a_step_is_that_of_its_width(output, observed):
    scheduler = Scheduler({})
    scheduler._clock, scheduler._context = StepClock(), 500.0
    scheduler._budget = SimpleNamespace(costs=Costs())
    scheduler._time_step(output)
    assert scheduler._budget.costs == [], "the first output ends no step that was timed"
    scheduler._time_step(output)
    assert scheduler._budget.costs == observed
