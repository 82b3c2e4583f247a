"""The training benchmark: its whole path on a CPU, and records that are extended."""

import json
import sys

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks")

TINY = [
    "--shapes", "8x40", "--rows", "64", "--batch-tokens", "32", "--num-layers", "1",
    "--online-layers", "2", "--online-shape", "128x60", "--micro-batch-sizes", "2",
    "--prompt-tokens", "3", "--answer-tokens", "5", "--seconds", "0.01", "--device", "cpu",
    "--no-compile-base",
]  # fmt: skip


def run(monkeypatch, path, *options) -> list[dict]:
    import bench_training

    command = ["bench_training.py", "--out", str(path), *TINY, *options]
    monkeypatch.setattr(sys, "argv", command)
    bench_training.main()
    return json.loads(path.read_text())["rows"]


def test_rows_are_measured_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.json"
    first = run(monkeypatch, path, "--online-layers", "0")
    assert [row["sequential"] for row in first] == [False, True]
    assert "git_sha" in first[0]
    rows = run(monkeypatch, path)
    assert rows[:2] == first
    shared, own = rows[2:]
    assert (shared["num_heads"], shared["lm_head"]) == (4, "shared")
    assert (own["num_heads"], own["lm_head"]) == (5, "own")
    assert not own["compiled_base"] and own["tokens_per_second"] > 0
    # 5 of 8 tokens are an answer's.
    with_prompts = own["tokens_per_second"] * 8 / 5
    assert own["tokens_per_second_with_prompts"] == pytest.approx(with_prompts, abs=0.5)
    capsys.readouterr()
    assert run(monkeypatch, path) == rows
    said = capsys.readouterr().out
    assert said.count("kept: ") == 2 and "measuring" not in said


def test_a_record_of_another_device_is_not_extended(tmp_path):
    from bench_training import Rows

    path = tmp_path / "r.json"
    made = {"gpus": ["another GPU, 580.1"], "processor": "p"}
    path.write_text(json.dumps({"provenance": made, "rows": []}))
    with pytest.raises(ValueError, match=r"made on \['another GPU'\], this is .* another --out"):
        Rows(path, "cpu")


def test_a_row_without_memory_is_left_out(tmp_path, capsys):
    from bench_training import Rows

    def run_out() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    rows = Rows(tmp_path / "r.json", "cpu")
    rows.add({"n": 1}, run_out)
    rows.add({"n": 2}, lambda: {"tokens_per_second": 5})
    assert "left out: CUDA out of memory\n" in capsys.readouterr().out
    assert [row["n"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == [2]


def test_products_of_one_token():
    from training_flop import base_flop, head_flop

    kind = {"num_heads": 2, "num_layers": 3, "hidden_size": 10, "vocab_size": 50}
    blocks = 3 * 2 * 3 * 100 - 200
    assert head_flop(kind) == 2 * (blocks + 2 * 2 * 500)
    assert head_flop({**kind, "lm_head": "own"}) == 2 * (blocks + 3 * 2 * 500)
    # Paths of one and of two tokens.
    path = 3 * 2 * 2 * 100
    assert head_flop({**kind, "sequential": True}) == 2 * (blocks + 2 * 2 * 500) + path
    assert base_flop(kind) == 0
    # Ten tokens, five of them an answer's, that see five others on average.
    base = {**kind, "base_parameters": 1700, "base_layers": 2, "prompt_tokens": 5,
            "answer_tokens": 5}  # fmt: skip
    assert base_flop(base) == 2 * (2 * 700 + 2 * 2 * 2 * 5 * 10)


def test_rows_behind_a_base_in_the_table(tmp_path, monkeypatch):
    import report_heads

    monkeypatch.setattr(report_heads, "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules["report_tables"], "ROOT", tmp_path)
    row = {
        "mode": "on line", "base_layers": 32, "hidden_size": 4096, "vocab_size": 32000,
        "num_heads": 5, "num_layers": 1, "lm_head": "own", "conversations_a_step": 16,
        "compiled_base": False, "prompt_tokens": 64, "answer_tokens": 960,
        "base_parameters": 6_738_415_616, "tokens_per_second": 25000, "peak_gpu_memory_gib": 40.0,
    }  # fmt: skip
    provenance = {"command": ["bench_training.py"], "gpus": ["a GPU"], "processor": "p"}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"provenance": provenance, "rows": [row]}))
    assert (
        "| on line, base of 6.7 billion parameters (not compiled), 16 conversations a step "
        "| 5 independent, 1 block(s), own lm_heads | 4096 x 32000 | 25k | 18.4 | 459 | 40.0 |"
    ) in report_heads.training_speed_section(path)
