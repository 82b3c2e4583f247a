"""Benchmarks of whole engines: their records, their arithmetic and their tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
PROVENANCE = {"command": ["/x/compare.py", "--out", "r.json"], "gpus": ["a GPU"], "processor": "p"}


pytestmark = pytest.mark.usefixtures("benchmarks")


def answer(tokens: int, seconds: float, histogram: list[int] | None) -> dict:
    """A finished request."""
    return {"token_ids": [7] * tokens, "seconds": seconds, "accepted_histogram": histogram}


def test_cells_are_kept_and_replaced(tmp_path):
    from cells import Cells

    path, head = tmp_path / "r.json", {"benchmark": "b", "rounds": 2}
    first = Cells(path, head)
    first.add({"n": 1}, {"value": 1})
    first.add({"n": 2}, {"value": 2})
    again = Cells(path, head)
    assert {"n": 2} in again and {"n": 3} not in again
    again.add({"n": 1}, {"value": 5})
    record = json.loads(path.read_text())
    assert [(c["key"]["n"], c["value"]) for c in record["cells"]] == [(2, 2), (1, 5)]
    assert record["benchmark"] == "b" and "git_sha" in record["provenance"]
    with pytest.raises(ValueError, match="rounds is 2 there and 3 now; choose another --out"):
        Cells(path, head | {"rounds": 3})


def test_time_limit(tmp_path):
    from cells import Cells

    assert Cells(tmp_path / "r.json", {}).has_time(1e9)
    cells = Cells(tmp_path / "r.json", {}, time_limit=60)
    assert cells.has_time(30) and not cells.has_time(90)


def test_steps_are_tokens_without_accepted_drafts():
    from compare import steps_of

    # 10 tokens of which 2 + 2 * 2 were drafts: 4 steps, and 6 plain ones.
    run = {"answers": [[answer(10, 2.0, [0, 2, 2])], [answer(6, 3.0, None)]]}
    assert steps_of(run) == {"tokens_per_step": 1.6, "step_ms": 500.0}


def test_heads_for_vllm_bring_the_targets_lm_head(tmp_path):
    from contenders import heads_for_vllm
    from safetensors import safe_open

    from vllm_medusa.checkpoint import load_heads
    from vllm_medusa.checkpoint_save import save_heads
    from vllm_medusa.head_weights import HeadSpec, HeadWeights

    torch.manual_seed(0)
    spec = HeadSpec(3, 1, 8, vocab_size=200, bias=True)
    weight, bias = torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(1, 3, 8).bfloat16()
    save_heads(HeadWeights(spec, weight, bias), tmp_path / "heads")
    lm_head = torch.randn(200, 8).bfloat16()
    model = tmp_path / "model"
    model.mkdir()
    save_file({"lm_head.weight": lm_head}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"hidden_size": 8, "vocab_size": 200}))
    copy = heads_for_vllm(str(model), str(tmp_path / "heads"), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    assert config["original_lm_head"] and config["medusa_fc_bias"] and config["num_heads"] == 3
    with safe_open(copy / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_heads.0.weight"), lm_head)
        assert torch.equal(file.get_tensor("blocks.2.layers.0.bias"), bias[0, 2])
    assert load_heads(copy).spec.common_lm_head
    # Made anew in the same place by the next call.
    assert heads_for_vllm(str(model), str(tmp_path / "heads"), tmp_path / "copy") == copy


def test_prompts_have_their_length_and_differ():
    from bench_widths import fill_prompts

    blocks, last = [list(range(10 * i, 10 * i + 7)) for i in range(5)], [[901, 902], [903]]
    prompts = fill_prompts(blocks, last, 60, 6, seed=3)
    assert [len(prompt) for prompt in prompts] == [60] * 6
    assert prompts[0][-2:] == last[0] and prompts[3][-1:] == last[1]
    assert len({tuple(prompt[:7]) for prompt in prompts}) > 1
    assert len({tuple(prompt[:-2]) for prompt in prompts}) == 6
    assert prompts == fill_prompts(blocks, last, 60, 6, seed=3)


def test_forced_lookup_goes_on_learning():
    from forced_nodes import ForcedLookup

    class Chosen(list):
        def look_again(self, context):
            self.append(context)

    chosen = Chosen([0, 3])
    forced = ForcedLookup(chosen, 7)
    forced.look_again(11.0)
    assert [forced[size] for size in range(len(forced))] == [7, 7, 7] and chosen[-1] == 11.0


def test_widths_beyond_the_tree_are_no_widths_of_their_own(monkeypatch):
    import forced_nodes

    scheduler = SimpleNamespace(
        _speculative_config=SimpleNamespace(token_tree=SimpleNamespace(num_nodes=5)),
        dynamic_sd_lookup=[0, 5],
        _budget=None,
    )
    monkeypatch.setattr(forced_nodes, "_schedulers", [scheduler])
    worker = object.__new__(forced_nodes.ForcedNodes)
    assert worker.force_nodes(5) == {"nodes_by_batch_size": [5], "share": None}
    assert scheduler.dynamic_sd_lookup[1] == 5
    with pytest.raises(ValueError, match="nodes is 7, expected at most the 5"):
        worker.force_nodes(7)
    worker.force_nodes(None)
    assert scheduler.dynamic_sd_lookup == [0, 5]


def test_percentile():
    from bench_latency import percentile

    assert percentile(list(range(1, 11)), 0.9) == 9
    assert percentile([5.0], 0.9) == 5.0


def spread(value: float) -> dict[str, float]:
    """Of one measurement."""
    return {"median": value, "min": value, "max": value}


def compared(side: str, level: int, speed: float, parted: list) -> dict:
    """A cell of compare.py."""
    agreement = {"identical": 1, "first_turns_compared": 2, "first_divergences": parted}
    return {
        "key": {"side": side, "concurrency": level}, "git_sha": "abc", "agreement": agreement,
        "speedup": spread(speed), "tokens_per_s": spread(9.0), "tokens_per_step": 1.5,
        "step_ms": spread(2.0), "plain_step_ms": spread(1.0),
    }  # fmt: skip


def section(name: str, record: dict, folder: Path, monkeypatch) -> str:
    """README's section of a record."""
    import report_comparisons
    import report_tables
    import roofline_figure

    monkeypatch.setattr(report_tables, "ROOT", folder)
    monkeypatch.setattr(report_comparisons, "ROOT", folder)
    monkeypatch.setattr(roofline_figure, "FIGURES", folder / "figures")
    path = folder / "record.json"
    common = {"provenance": PROVENANCE, "label": "L", "max_tokens": 8, "rounds": 1}
    path.write_text(json.dumps(common | record))
    return getattr(report_comparisons, name)(path)


def test_who_wins_where(tmp_path, monkeypatch):
    from compare import winners

    failed = {"key": {"side": "suffix", "concurrency": None}, "git_sha": "abc", "failed": "absent"}
    cells = [compared("tree", 1, 2.0, []), compared("ngram", 1, 1.1, [{"position": 4}]),
             compared("tree", 8, 0.9, []), failed]  # fmt: skip
    assert winners(cells) == [
        "1 at once: tree wins (tree 2.00, ngram 1.10; plain 1)",
        "8 at once: plain wins (tree 0.90; plain 1)",
    ]
    text = section("compare_section", {"order": "o", "cells": cells}, tmp_path, monkeypatch)
    assert (
        "| 1 | tree | 9.0 | **2.00 (2.00-2.00)** | 1.50 | 1.33 | 2.00 (1.00) | 1 of 2 | - |" in text
    )
    assert "| 1 | ngram | 9.0 | 1.10 (1.10-1.10) | 1.50 | 0.73 | 2.00 (1.00) | 1 of 2 | 4 |" in text
    assert "| 8 | tree | 9.0 | 0.90" in text and "Not measured: suffix: absent." in text
    assert "at most 8 tokens, temperature 0, 1 rounds" in text
    warm = compared("tree", 1, 0.95, []) | {"agreement": None}
    warm["key"]["temperature"] = 0.7
    assert (
        winners([*cells, warm])[1] == "1 at once, temperature 0.7: plain wins (tree 0.95; plain 1)"
    )
    text = section(
        "compare_section", {"order": "o", "cells": [*cells, warm]}, tmp_path, monkeypatch
    )
    assert "| 0 | 1 | tree | 9.0 | **2.00" in text and "at most 8 tokens, 1 rounds" in text
    assert "| 0.7 | 1 | tree | 9.0 | 0.95 (0.95-0.95) | 1.50 | 0.63 | 2.00 (1.00) | - | - |" in text


@pytest.mark.parametrize(
    ("named", "shown"),
    [({}, "finite batch"), ({"load": "finite batch"}, "finite batch"),
     ({"load": "closed loop"}, "closed loop")],
    ids=["of old", "finite", "closed"],
)  # fmt: skip
def test_tables_name_the_load(tmp_path, monkeypatch, named, shown):
    record = named | {"order": "o", "cells": [compared("tree", 1, 2.0, [])]}
    text = section("compare_section", record, tmp_path, monkeypatch)
    assert f"first turns of MT-Bench, {shown}, at most 8 tokens" in text


def test_tables_name_what_left_tokens_out(tmp_path, monkeypatch):
    filters = {"top_p": 0.9, "top_k": None}
    record = filters | {"order": "o", "cells": [compared("tree", 1, 2.0, [])]}
    text = section("compare_section", record, tmp_path, monkeypatch)
    assert "at most 8 tokens, temperature 0, top-p 0.9, 1 rounds" in text


def test_table_of_widths(tmp_path, monkeypatch):
    widths = {"adaptive": 19.0, "0": 10.0, "7": 20.0}
    cell = {
        "key": {"concurrency": 2, "context": 512}, "git_sha": None,
        "widths": {name: {"tokens_per_s": spread(value)} for name, value in widths.items()},
        "chosen": [{"nodes": 7, "share": 0.5}, {"nodes": 7, "share": 0.5}],
        "adaptive_over_best_fixed": 0.95,
    }  # fmt: skip
    record = {"nodes": [0, 7, 63], "finalists": 2, "cells": [cell]}
    text = section("widths_section", record, tmp_path, monkeypatch)
    assert "| context | requests at once | 0 nodes | 7 nodes | 63 nodes | adaptive |" in text
    assert "| 512 | 2 | 10 | 20 | - | 19 | 7 | 0.95 |" in text


class Stopwatch:
    """An engine whose answers take a known time."""

    def __init__(self, first: float, seconds: float):
        self.first, self.seconds, self.asked = first, seconds, []

    def run(self, requests, sampling, level, stream):
        self.asked.append((len(requests), sampling["max_tokens"], sampling.get("ignore_eos")))
        answer = {"first_token_seconds": self.first, "token_ids": [1] * sampling["max_tokens"]}
        return {"seconds": self.seconds, "answers": [answer] * len(requests)}


def test_table_of_first_tokens(tmp_path, monkeypatch):
    from argparse import Namespace

    from bench_latency import line, measure

    engines = {"stock": Stopwatch(0.01, 2.0), "plugin off": Stopwatch(0.01, 2.5),
               "medusa": Stopwatch(0.02, 1.0)}  # fmt: skip
    args = Namespace(num_questions=3, first_tokens=4, rate_questions=2, max_tokens=50, rounds=2)
    found = measure(engines, [["a"], ["b"]], args, 2)
    assert engines["stock"].asked == [(2, 24, None), *[(6, 4, None)] * 2, *[(2, 50, True)] * 2]
    assert engines["medusa"].asked == [(2, 24, None), *[(6, 4, None)] * 2]
    assert "medusa: first token 20.0 ms (p90 20.0), 2.000 times" in line(found)
    assert "plugin off: first token 10.0 ms (p90 10.0), 1.000 times, 40.0 tok/s" in line(found)
    cell = {"key": {"concurrency": 2}, "git_sha": "abc", **found}
    record = {"sides": list(engines), "cells": [cell]}
    text = section("latency_section", record, tmp_path, monkeypatch)
    assert "| 2 | stock | 10.0 | 10.0 | 1 | 50.0 | 1 |" in text
    assert "| 2 | plugin off | 10.0 | 10.0 | 1.000 (1.000-1.000) | 40.0 | 0.8000 ± 0.0000 |" in text
    assert "| 2 | medusa | 20.0 | 20.0 | 2.000 (2.000-2.000) | - | - |" in text


def test_roofline(tmp_path, monkeypatch):
    from roofline import points, step_work

    sizes = {
        "weight_bytes": 2e9, "product_weights": 1e9, "draft_bytes": 1e9,
        "cache_bytes_per_token": 1000, "flops_per_row_and_key": 100,
        "steps": [[1, 1, 9, 0.002], [4, 1, 6, 0.002], [4, 2, 6, 0.008]],
    }  # fmt: skip
    assert step_work(sizes, 1, 1, 9) == (2e9 + 10_000, 2e9 + 1000)
    assert step_work(sizes, 4, 2, 6) == (3e9 + 20_000, 8 * (2e9 + 1000))
    found = points(sizes, bandwidth=2.0, tflops=4.0)
    assert [point["bound"] for point in found] == ["bytes", "products", "products"]
    assert found[0]["floor_ms"] == pytest.approx(1.0, rel=1e-4)
    assert found[2]["floor_ms"] == pytest.approx(4.0, rel=1e-4)
    assert found[2]["tflops"] == pytest.approx(2.0, rel=1e-4)
    record = {"bandwidth": 2.0, "tflops": 4.0, "points": [p | {"context": 6} for p in found]}
    record["points"][1]["ms"] = 2.1
    text = section("roofline_section", record, tmp_path, monkeypatch)
    told = "One request, empty steps as the engine times them at start: one of 3 nodes takes 1.050"
    assert f"{told} times a plain one." in text
    assert text.endswith("![Roofline](figures/record.svg)")
    assert "| 0 | 2.00 (50%) | - |" in text and "| 3 | 2.10 (95%) | 8.00 (50%) |" in text


def test_figure_of_a_roofline_is_of_its_record(tmp_path, monkeypatch):
    import roofline_figure

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(roofline_figure, "FIGURES", tmp_path)
    point = {"nodes": 0, "requests": 1, "context": 6, "flops_per_byte": 1.0, "tflops": 0.5}
    record = {"bandwidth": 2.0, "tflops": 4.0, "label": "L", "points": [point]}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record))
    assert not roofline_figure.roofline_is_current(path)
    roofline_figure.draw_roofline(record, tmp_path / "r.svg")
    assert roofline_figure.roofline_is_current(path)
    path.write_text(json.dumps(record | {"points": [point | {"tflops": 0.6}]}))
    assert not roofline_figure.roofline_is_current(path)


def test_table_of_a_profile(tmp_path, monkeypatch):
    def part(step: float, **kinds: float) -> dict:
        return {"1": {"pure": {"step_us": spread(step), "by_kind_us": kinds}}}

    sides = {"plain": part(6000.0, products=5000.0),
             "nodes63": part(6300.0, products=5100.0, heads=100.0, draft=26.0)}  # fmt: skip
    record = {"sides": sides, "questions": 0, "prompt_tokens": 512, "tokens": 48}
    text = section("profile_section", record, tmp_path, monkeypatch)
    assert "| ms a step | over plain | draft | heads | products | heads and drafting, share" in text
    assert "| 1 | nodes63 | 6.30 | 1.050 | 26 | 100 | 5100 | 2.0% |" in text
    assert "| 1 | plain | 6.00 | 1.000 | - | - | 5000 | 0.0% |" in text


class LoopEngine:
    """An engine under any load; its rounds take a second of full slots and two by the clock."""

    def __init__(self):
        self.asked = []

    def run(self, requests, sampling, level, load="finite batch"):
        self.asked.append((len(requests), level, load))
        found = answer(10, 1.0, [1, 3]) | {"prompt_token_ids": [1], "text": "t"}
        return {"seconds": 1.0, "seconds_with_tail": 2.0, "answers": [found] * len(requests)}

    def call_workers(self, method, nodes):
        if method == "expected_steps":
            return [[{"nodes": 3, "ms": 1.0, "accepted": 0.5}]]
        return [{"nodes_by_batch_size": [7, 3], "share": 0.5}]

    def next_logprobs(self, prompts):
        raise AssertionError("all answers are equal")


def test_widths_are_measured_in_closed_loops():
    from argparse import Namespace

    from bench_widths import measure

    engine = LoopEngine()
    args = Namespace(max_tokens=10, nodes=[0, 7, 1023], rounds=1, finalists=2)
    found = measure(engine, [[1, 2], [3, 4]], args, 2)
    # Each prompt once for the prefix cache, as a warm-up and for each width, of which 1023 nodes
    # have no graphs for two requests; then two widths and the adaptive choice.
    scouts = [(2, 2, "closed loop")] * 3
    assert engine.asked == [(2, 2, "finite batch"), *scouts, *[(6, 2, "closed loop")] * 3]
    assert found["prompts"] == 2 and found["requests"] == 6
    assert found["widths"]["0"]["tokens_per_s"]["median"] == 60.0
    assert measure(LoopEngine(), [[1, 2], [3, 4]], args, 1)["requests"] == 2


class WidthEngine(LoopEngine):
    """One whose rounds take the time of the width at which it is held."""

    seconds = {None: 2.0, 0: 5.0, 3: 1.0, 7: 3.0}  # noqa: RUF012

    def call_workers(self, method, nodes):
        if method == "force_nodes":
            self.width = nodes
        return super().call_workers(method, nodes)

    def run(self, requests, sampling, level, load="finite batch"):
        found = super().run(requests, sampling, level, load)
        return found | {"seconds": self.seconds[self.width]}


def test_best_widths_take_turns_with_the_adaptive_choice():
    from argparse import Namespace

    from bench_widths import measure

    args = Namespace(max_tokens=10, nodes=[0, 3, 7], rounds=3, finalists=2)
    found = measure(WidthEngine(), [[1, 2], [3, 4]], args, 2)
    counts = {width: own["tokens_per_s"]["count"] for width, own in found["widths"].items()}
    assert counts == {"adaptive": 3, "0": 1, "3": 3, "7": 3}
    assert found["widths"]["0"]["tokens_per_s"]["median"] == 2 * 10 / 5
    assert (found["best_fixed"], found["adaptive_over_best_fixed"]) == (3, 0.5)


@pytest.mark.parametrize(("level", "count"), [(1, 2), (4, 12)])
def test_serving_reports_the_closed_loop_and_keeps_the_wall_clock(level, count):
    from argparse import Namespace
    from types import SimpleNamespace

    from bench_serving import measure

    sides = {"plain": LoopEngine(), "medusa": LoopEngine()}
    args = Namespace(num_questions=2, rounds=1, turns=2, max_tokens=10, seed=0,
                     synthetic_acceptance=None)  # fmt: skip
    pool = [SimpleNamespace(turns=["a", "b"], category="c")] * 3
    found = measure(sides, pool, args, level, 0.0)
    warm_up = (min(count, max(2, level)), level, "finite batch")
    loop = (count, level, "closed loop")
    assert sides["medusa"].asked == [warm_up, warm_up, loop, loop]
    # Both turns: 20 tokens of a question in 2 s of full slots, 4 s by the clock.
    assert found["medusa_tokens_per_s"]["median"] == 10 * count
    assert found["with_tail"]["tokens_per_s"]["medusa"]["median"] == 5 * count
    assert found["speedup"]["median"] == 1.0 and found["num_questions"] == count
