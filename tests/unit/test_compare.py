"""compare.py: the order of contenders, what is left to measure, and what a failure leaves."""

from __future__ import annotations

import json
import operator
import sys
from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")


COMMAND = ["compare.py", "--model", "M", "--heads", "H", "--out", "r.json"]


def arguments(*words: str) -> Namespace:
    """compare.py's, of a command line."""
    from compare import parse_args

    with mock.patch.object(sys, "argv", [*COMMAND, *words]):
        return parse_args()


@pytest.fixture
def cells(tmp_path):
    from cells import Cells

    return Cells(tmp_path / "r.json", {"benchmark": "compare", "load": "closed loop"})


def test_what_matters_most_is_measured_first():
    from contenders import contenders

    args = arguments(
        *("--sides", "suffix", "ngram", "tree", "ngram_gpu", "chain", "vllm-medusa", "dynamic"),
        *("--side", 'sequential={"method": "medusa", "model": "HEADS"}'),
    )
    assert list(contenders(args)) == [
        "dynamic", "sequential", "tree", "chain", "vllm-medusa", "ngram_gpu", "ngram", "suffix",
    ]  # fmt: skip
    args = arguments("--sides", "ngram", "--side", 'mine={"method": "ngram"}')
    assert list(contenders(args)) == ["mine", "ngram"]


def test_measured_and_failed_cells_are_left_out_unless_named_again(cells):
    from cases import Case
    from compare import left_to_do

    one, eight = Case(1), Case(8)
    cells.add({"side": "tree", "concurrency": 8}, {})
    cells.add({"side": "suffix", "concurrency": None}, {"failed": "absent"})
    sides = ["tree", "suffix"]
    assert left_to_do(cells, sides, [one, eight], []) == {"tree": [one]}
    both = {"tree": [one, eight], "suffix": [one, eight]}
    assert left_to_do(cells, sides, [one, eight], sides) == both
    # Greedy cells are those of records from before there was a temperature.
    assert left_to_do(cells, ["tree"], [eight, Case(8, 0.7)], []) == {"tree": [Case(8, 0.7)]}
    cells.add(Case(8, 0.7).key("tree"), {})
    assert left_to_do(cells, ["tree"], [eight, Case(8, 0.7)], []) == {"tree": []}
    with pytest.raises(ValueError, match=r"--again names \['chain'\], expected some of"):
        left_to_do(cells, sides, [one], ["chain"])


@pytest.mark.parametrize("old", [{}, {"load": "finite batch"}], ids=["unnamed", "finite"])
def test_a_record_of_the_other_load_is_refused(tmp_path, old):
    from cells import Cells, record_head

    head = record_head(arguments(), "compare", "closed loop")
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**head, "cells": [], "load": None} | old))
    with pytest.raises(ValueError, match=r"load is .* there and 'closed loop' now; choose another"):
        Cells(path, head)


@pytest.mark.parametrize(
    ("old", "words", "message"),
    [
        ({}, (), None),
        ({"top_p": 0.9, "top_k": 20}, ("--top-p", "0.9", "--top-k", "20"), None),
        ({}, ("--top-p", "0.9"), "top_p is None there and 0.9 now"),
        ({"top_p": 0.9}, (), "top_p is 0.9 there and None now"),
        ({"top_p": 0.9}, ("--top-p", "0.9", "--top-k", "20"), "top_k is None there and 20 now"),
    ],
    ids=["neither named", "equal", "now only", "then only", "one more"],
)
@pytest.mark.parametrize("benchmark", ["compare", "serving"])
def test_a_record_of_other_filters_is_refused(
    tmp_path, monkeypatch, benchmark, old, words, message
):
    import bench_serving
    from cells import record_head
    from records import earlier_record

    if benchmark == "compare":
        head = record_head(arguments(*words), "compare", "closed loop")
    else:
        monkeypatch.setattr(sys, "argv", [*COMMAND, *words])
        head = bench_serving.document(bench_serving.parse_args(), {}, {})
    path = tmp_path / "r.json"
    # Records from before there were filters name none.
    path.write_text(json.dumps({k: v for k, v in head.items() if not k.startswith("top_")} | old))
    if message is None:
        assert earlier_record(path, head) == json.loads(path.read_text())
        return
    with pytest.raises(ValueError, match=message):
        earlier_record(path, head)


class Side:
    """An engine that starts, or not."""

    def __init__(self, name: str, error: Exception | None = None):
        self.name, self.error, self.closed = name, error, False

    def wait_ready(self):
        if self.error is not None:
            raise self.error

    def close(self):
        self.closed = True


def run_one(monkeypatch, cells, side, measured, took=None, plain=None):
    """``run_side`` at 1 and 8 with known measurements, exceptions among them."""
    import compare
    from cases import Case

    def measure(plain, side, pool, args, case):
        found = measured[case.concurrency]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "line", str)
    start = side if callable(side) else lambda: side
    cases = [Case(1), Case(8)]
    plain, took = plain or Side("plain"), {} if took is None else took
    compare.run_side("s", cases, start, plain, [], Namespace(), cells, took)
    return {cell["key"]["concurrency"]: cell for cell in cells.cells}


def test_engine_that_does_not_start_is_one_line(monkeypatch, cells):
    from engine_process import EngineError

    side = Side("s", EngineError("s", "ValueError: no such head", "Traceback\n .."))
    found = run_one(monkeypatch, cells, side, {})
    assert found[None]["failed"] == "ValueError: no such head" and side.closed


def test_missing_package_is_one_line(monkeypatch, cells):
    import contenders

    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    make, _ = contenders.contenders(arguments("--sides", "suffix"))["suffix"]
    found = run_one(monkeypatch, cells, make, {})
    assert found[None]["failed"] == (
        "RuntimeError: suffix decoding needs arctic-inference, which is not installed"
    )


def test_failure_keeps_what_was_measured_and_success_forgets_it(monkeypatch, cells):
    from engine_process import EngineError

    gone = EngineError("s", "its process ended with code -9")
    found = run_one(monkeypatch, cells, Side("s"), {1: {"v": 1}, 8: gone})
    assert found[1]["v"] == 1 and found[None]["failed"] == "its process ended with code -9"
    found = run_one(monkeypatch, cells, Side("s"), {1: {"v": 2}, 8: {"v": 3}})
    assert {level: cell["v"] for level, cell in found.items()} == {1: 2, 8: 3}
    assert len(json.loads(cells.path.read_text())["cells"]) == 2


def test_failing_plain_engine_ends_the_run(monkeypatch, cells):
    from engine_process import EngineError

    side = Side("s")
    with pytest.raises(EngineError, match="engine 'plain' failed: out of memory"):
        run_one(monkeypatch, cells, side, {1: EngineError("plain", "out of memory")})
    assert side.closed and not cells.cells
    side, plain = Side("s"), Side("plain", EngineError("plain", "no GPU"))
    with pytest.raises(EngineError, match="engine 'plain' failed: no GPU"):
        run_one(monkeypatch, cells, side, {}, plain=plain)
    assert side.closed and not cells.cells


def test_level_without_time_is_left_out(monkeypatch, tmp_path):
    from cells import Cells

    cells = Cells(tmp_path / "r.json", {}, time_limit=60)
    found = run_one(monkeypatch, cells, Side("s"), {8: {"v": 3}}, {1: 50.0, 8: 30.0})
    assert list(found) == [8]


@pytest.mark.parametrize(
    ("took", "measured"),
    [({None: 500.0, 1: 40.0}, [1, 8]), ({None: 0.0, 2: 55.0, 8: 40.0}, [8])],
    ids=["a start is no measure", "unknown levels are as long as the longest"],
)
def test_level_that_was_not_measured_yet(monkeypatch, tmp_path, took, measured):
    from cells import Cells

    cells = Cells(tmp_path / "r.json", {}, time_limit=60)
    assert list(run_one(monkeypatch, cells, Side("s"), {1: {}, 8: {}}, took)) == measured
    assert took[8] == 40.0 or measured == [1, 8]


def test_engine_whose_process_ends_is_named_with_its_code(monkeypatch):
    import engine_process

    # A process that does nothing.
    monkeypatch.setattr(engine_process, "_serve", operator.ne)
    engine = engine_process.EngineProcess("lost", {})
    for ask in (engine.wait_ready, engine.cache_tokens):
        with pytest.raises(engine_process.EngineError, match="'lost' failed: its process ended wi"):
            ask()
    engine.close()


def test_what_an_engine_raises_comes_back_as_a_line_and_a_traceback(monkeypatch):
    import engine_process

    def refuse(**arguments):
        raise ValueError("1 validation error\n  for   max_num_seqs\n")

    sent = []
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=refuse))
    engine_process._serve(SimpleNamespace(send=sent.append), {})
    ((kind, (reason, details)),) = sent
    assert kind == "failed" and reason == "ValueError: 1 validation error for max_num_seqs"
    assert details.startswith("Traceback")


class Engine:
    """Answers at once; remembers how it was asked."""

    def __init__(self, seconds: float, tail: float):
        self.seconds, self.tail, self.asked, self.sampling = seconds, tail, [], None

    def run(self, requests, sampling, level, *, load):
        heat, self.sampling = sampling["temperature"], sampling
        self.asked.append((len(requests), sampling["max_tokens"], level, load, heat))
        answer = {
            "token_ids": [1] * 10, "prompt_token_ids": [2], "text": "t", "seconds": self.seconds,
            "accepted_histogram": None,
        }  # fmt: skip
        return {"seconds": self.seconds, "seconds_with_tail": self.tail,
                "answers": [answer] * len(requests)}  # fmt: skip


@pytest.mark.parametrize(("level", "count", "heat"), [(1, 4, 0.0), (2, 6, 0.0), (2, 6, 0.7)])
def test_speed_up_is_the_closed_loops(level, count, heat):
    from cases import Case
    from compare import measure

    plain, side = Engine(10.0, 10.0), Engine(5.0, 8.0)
    args = Namespace(
        num_questions=4, turns=1, max_tokens=32, rounds=2, seed=0, synthetic_acceptance=None
    )
    pool = [SimpleNamespace(turns=["q"], category="c")] * 5
    found = measure(plain, side, pool, args, Case(level, heat))
    rounds = [(count, 32, level, "closed loop", heat)] * 2
    assert plain.asked == [(2, 24, level, "finite batch", heat), *rounds]
    assert side.asked == [(4, 32, level, "finite batch", heat), *rounds]
    assert (found["agreement"] is None) == (heat > 0)
    assert found["num_questions"] == count
    assert found["speedup"]["median"] == 2.0
    assert found["tokens_per_s"]["median"] == 2 * count
    assert found["with_tail"]["speedup"]["side"]["median"] == 10 / 8
    assert found["with_tail"]["tokens_per_s"]["plain"]["median"] == count


@pytest.mark.parametrize(
    ("words", "asked"),
    [([], {}), (["--top-p", "0.9", "--top-k", "20"], {"top_p": 0.9, "top_k": 20})],
    ids=["off", "on"],
)
def test_every_request_is_asked_with_the_filters(words, asked):
    from bench_serving import answer

    engine, args = Engine(1.0, 1.0), arguments(*words)
    args.turns = 1
    answer(engine, [SimpleNamespace(turns=["q"])], args, 1, 0.6)
    assert engine.sampling == {"temperature": 0.6, "max_tokens": 128} | asked
