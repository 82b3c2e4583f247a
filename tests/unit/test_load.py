"""Closed loops and finite batches, on an engine whose steps take a known time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


@dataclasses.dataclass
class Params:
    """What of SamplingParams the load changes."""

    max_tokens: int


class FakeEngine:
    """A step takes ``step_s`` and hands every request ``tokens_per_step(name)`` tokens.

    A prompt's first token id is the length at which its answer ends by itself.
    """

    def __init__(self, clock: SimpleNamespace, tokens_per_step=lambda name: 1, step_s: float = 1.0):
        self.clock, self.tokens_per_step, self.step_s = clock, tokens_per_step, step_s
        self.running: dict[str, list[int]] = {}
        self.started, self.batches, self.aborted = [], [], []

    def add_request(self, name, prompt, params):
        assert name not in self.running
        self.started.append((name, params.max_tokens))
        length = min(params.max_tokens, prompt["prompt_token_ids"][0])
        self.running[name] = [0, length, prompt]

    def step(self):
        self.clock.now += self.step_s
        self.batches.append(len(self.running))
        outputs = []
        for name, state in list(self.running.items()):
            state[0] = min(state[1], state[0] + self.tokens_per_step(name))
            finished = state[0] == state[1]
            ids = [5] * state[0]
            completion = SimpleNamespace(token_ids=ids, text="t", spec_decode_metrics=None)
            outputs.append(
                SimpleNamespace(
                    request_id=name, finished=finished, outputs=[completion], **state[2]
                )
            )
            if finished:
                del self.running[name]
        return outputs

    def abort_request(self, names):
        self.aborted += names
        for name in names:
            del self.running[name]

    def has_unfinished_requests(self):
        return bool(self.running)


@pytest.fixture
def clock(monkeypatch, benchmarks):
    """``load``'s clock, moved by the engine alone."""
    import load

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(load.time, "perf_counter", lambda: clock.now)
    return clock


def requests(lengths: list[int], most: int = 1000) -> tuple[list[dict], list[Params]]:
    """Prompts whose answers have these lengths."""
    return [{"prompt_token_ids": [n]} for n in lengths], [Params(most) for _ in lengths]


def rate(run: dict, clock: str = "seconds") -> float:
    """Tokens per second of a run."""
    return sum(len(answer["token_ids"]) for answer in run["answers"]) / run[clock]


@pytest.mark.parametrize("load", ["closed loop", "finite batch"])
def test_one_slot_is_full_under_both_loads(clock, load):
    from load import answer_all

    engine = FakeEngine(clock)
    run = answer_all(engine, *requests([4, 2, 6]), 1, load)
    assert engine.started == [("0", 1000), ("1", 1000), ("2", 1000)]
    assert not engine.aborted and engine.batches == [1] * 12
    assert run["seconds"] == run["seconds_with_tail"] == 12.0
    assert [len(answer["token_ids"]) for answer in run["answers"]] == [4, 2, 6]


def test_finite_batch_empties(clock):
    from load import answer_all

    engine = FakeEngine(clock)
    run = answer_all(engine, *requests([4, 8]), 2, "finite batch")
    assert engine.batches == [2] * 4 + [1] * 4 and not engine.aborted
    assert run["seconds"] == run["seconds_with_tail"] == 8.0
    assert rate(run) == 12 / 8


def test_closed_loop_keeps_slots_full_until_the_last_measured_answer(clock):
    from load import answer_all

    engine = FakeEngine(clock)
    run = answer_all(engine, *requests([8] * 4 + [40] + [8] * 7), 4, "closed loop")
    names = [name for name, _ in engine.started]
    assert names[:16] == [f"lead-in {i}" for i in range(4)] + [str(i) for i in range(12)]
    fillers = names[16:]
    assert fillers == [f"filler {i}" for i in range(len(fillers))] and fillers
    assert set(engine.batches) == {4}
    assert engine.aborted and set(engine.aborted) <= set(fillers) and not engine.running
    # One token a step from each of four slots, whatever the lengths.
    assert rate(run) == pytest.approx(4.0)
    assert rate(run, "seconds_with_tail") < 4.0
    assert [len(answer["token_ids"]) for answer in run["answers"]] == [8] * 4 + [40] + [8] * 7


def test_uneven_answers_look_slower_in_a_finite_batch_only(clock):
    from load import answer_all

    rates = {}
    for load in ("closed loop", "finite batch"):
        # Of the same speed on average over the questions: 1 and 3 tokens a step by turns.
        uneven = FakeEngine(clock, lambda name: 1 + 2 * (int(name.split()[-1]) % 2))
        rates[load] = rate(answer_all(uneven, *requests([96] * 24), 8, load))
    # Half of the answers take 96 steps and half 32: 96 tokens in 64 steps on average, 8 slots.
    assert rates["closed loop"] == pytest.approx(8 * 96 / 64)
    assert rates["finite batch"] < 0.9 * rates["closed loop"]


def test_lead_in_spreads_the_starts(clock):
    from load import answer_all

    engine = FakeEngine(clock)
    answer_all(engine, *requests([1000] * 12, most=16), 4, "closed loop")
    assert engine.started[:4] == [(f"lead-in {i}", n) for i, n in enumerate([4, 8, 12, 16])]
    assert engine.started[4:] == [(name, 16) for name, _ in engine.started[4:]]


def test_lead_in_has_a_token_and_prompts_come_again_where_they_are_few(clock):
    from load import answer_all, request_stream

    prompts, params = requests([7, 9], most=3)
    stream = request_stream(prompts, params, 5, "closed loop")
    first = [next(stream) for _ in range(10)]
    assert [request.params.max_tokens for request in first] == [1, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    lengths = [request.prompt["prompt_token_ids"][0] for request in first]
    assert lengths == [9, 7, 9, 7, 9, 7, 9, 7, 9, 7]
    assert [request.place for request in first] == [None] * 5 + [0, 1] + [None] * 3
    assert [own.max_tokens for own in params] == [3, 3]
    run = answer_all(FakeEngine(clock), prompts, params, 5, "closed loop")
    assert [len(answer["token_ids"]) for answer in run["answers"]] == [3, 3]


def test_first_tokens_are_timed_from_a_requests_own_start(clock):
    from load import answer_all

    engine = FakeEngine(clock, step_s=0.5)
    run = answer_all(engine, *requests([4, 4, 4]), 2, "finite batch", stream=True)
    assert [answer["first_token_seconds"] for answer in run["answers"]] == [0.5] * 3
    assert [answer["seconds"] for answer in run["answers"]] == [2.0] * 3


def test_unknown_load_is_named(clock):
    from load import answer_all

    with pytest.raises(ValueError, match="load is 'waves', expected one of 'closed loop', 'finite"):
        answer_all(FakeEngine(clock), *requests([1]), 1, "waves")


def test_number_of_measured_requests(benchmarks):
    from load import num_measured

    assert [num_measured(16, n) for n in (1, 2, 5, 6, 64)] == [16, 16, 16, 18, 192]
