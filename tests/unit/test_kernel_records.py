"""Records of kernels: what peers, profilers and checkers print becomes rows and tables."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")

MADE = {"command": ["x.py", "--out", "r.json"], "gpus": ["a GPU"], "processor": "p"}


def write(path, record):
    path.write_text(json.dumps({"provenance": MADE} | record))
    return path


@pytest.fixture
def in_results(tmp_path, monkeypatch):
    """Tables name records relative to the repository."""
    import report_tables

    monkeypatch.setattr(report_tables, "ROOT", tmp_path)
    return tmp_path


def peers_row(context, **medians):
    shape = {"batch": 1, "context": context, "rows": 8, "heads": 32, "kv_heads": 8,
             "head_size": 128}  # fmt: skip
    kernels = {
        name: {"failed": "no"} if median is None else {"median": median}
        for name, median in medians.items()
    }
    return {"shape": shape, "kernels": kernels}


def test_peers_are_counted_where_they_ran(in_results):
    from report_kernels import peers_section

    rows = [
        peers_row(128, tree=10.0, flashinfer=20.0, xformers=None),
        peers_row(512, tree=10.2, flashinfer=10.0, xformers=None),
        peers_row(2048, tree=10.0, flashinfer=9.0, xformers=None),
    ]
    record = {"benchmark": "tree_attention_peers", "rows": rows}
    lines = peers_section(write(in_results / "r.json", record)).splitlines()
    assert "| FlashInfer, custom mask | 3 | 0 | 1 | 2 | 0.90 / 0.98 / 2.00 | 1, 2048, 8, " in (
        "".join(lines)
    )
    assert any(line.startswith("| xformers, pages of 64 | 0 | 3 | - |") for line in lines)
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(tables)) == 1
    assert peers_section(write(in_results / "r.json", record | {"benchmark": "one"})) == ""


def test_counters_of_a_page(in_results):
    from profile_kernels import read_counters
    from report_kernels import counters_section

    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    names = ["ID", "Kernel Name", "Ranges", "gpu__time_duration.sum",
             "launch__registers_per_thread", stall.format("barrier"), stall.format("wait"),
             "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"]  # fmt: skip
    rows = [names, ["", "", "", "ns", "", "", "", "%"],
            ["0", "tree_kernel", "<d>:case=bs1 ctx 8:none", "12,500", "168", "0.5", "2.25", "n/a"],
            ["1", "other", "", "500", "32", "0", "1", "40"]]  # fmt: skip
    page = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    first, second = read_counters(f"==PROF== Connected\n{page}\n==PROF== done\n")
    assert first == {
        "case": "bs1 ctx 8", "kernel": "tree_kernel", "microseconds": 12.5, "registers": 168.0,
        "waits": {"wait": 2.25, "barrier": 0.5},
    }  # fmt: skip
    assert (second["case"], second["tensor_percent"], second["waits"]) == (None, 40.0, {"wait": 1})
    text = counters_section(write(in_results / "r.json", {"kernels": [first, second]}))
    assert "| bs1 ctx 8: `tree_kernel` | 12.5 | 168 | - |" in text
    with pytest.raises(ValueError, match="no table"):
        read_counters("==ERROR== Failed")


@pytest.mark.parametrize(
    ("name", "output", "code", "clean"),
    [
        ("clean", "3 passed in 1s\n========= ERROR SUMMARY: 0 errors\n", 0, True),
        ("warnings", "3 passed\n========= RACECHECK SUMMARY: 0 hazards displayed (0 e)\n", 0, True),
        ("errors", "3 passed in 1s\n========= ERROR SUMMARY: 10 errors\n", 9, False),
        ("failed-test", "1 failed in 1s\n========= ERROR SUMMARY: 0 errors\n", 1, False),
        ("never-ran", "", 0, False),
    ],
)
def test_a_tool_is_clean_only_if_it_says_so(in_results, name, output, code, clean):
    from check_sanitizer import judge
    from report_kernels import sanitizer_section

    one = judge("memcheck", ["compute-sanitizer"], output, code)
    assert one["clean"] is clean
    assert "| memcheck | " in sanitizer_section(write(in_results / "r.json", {"tools": [one]}))


def test_every_kernel_is_checked():
    """A new kernel is named in the script that runs compute-sanitizer."""
    import ast
    from pathlib import Path

    from check_sanitizer import KERNELS, ROOT

    launched = {
        node.name
        for path in Path(ROOT, "triton_kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert launched == set(KERNELS)


def test_rates_reached():
    from attention_figures import reached

    rates = {"copy_bytes_per_s": 2e12, "product_flop_per_s": 1e15}
    found = reached(100.0, 20.0, num_bytes=1e8, flop=8e9, rates=rates)
    assert (found["gb_per_s"], found["copy_percent"], found["product_percent"]) == (1000, 50, 8)
    assert (found["roofline_percent"], found["roofline_percent_without_start"]) == (50, 62.5)


def test_products_with_float8_weights(in_results):
    from report_float8 import float8_product_section

    rows = [
        {"weight": [1, 32064, 4096], "rows": 4,
         **{name: {"median": us} for name, us in (("float8", 65.67), ("torch", 100.0))}},
        {"weight": [4, 4096, 4096], "rows": 1,
         **{name: {"median": 30.0} for name in ("float8", "torch", "marlin", "scaled_mm")}},
    ]  # fmt: skip
    record = {"benchmark": "float8_product", "dtype": "bfloat16", "rows": rows}
    lines = float8_product_section(write(in_results / "r.json", record)).splitlines()
    assert "| 32064 x 4096 | 4 | 65.7 | 2.00 | 100.0 | - | - |" in lines
    assert "| 4 of 4096 x 4096 | 1 | 30.0 | 2.24 | 30.0 | 30.0 | 30.0 |" in lines


def test_heads_rounded_to_float8(in_results):
    from report_float8 import float8_heads_section

    row = {"nodes": 63, "unquantised": 2.5, "float8": 2.49, "ratio": 0.996,
           "ratio_interval": [0.99, 1.001]}  # fmt: skip
    record = {
        "model": "M", "dtype": "float32", "num_questions": 80, "answer_tokens": 17145,
        "draft_vocab_size": 12288, "heads": {"H": {"rows": [row]}},
    }  # fmt: skip
    text = float8_heads_section(write(in_results / "r.json", record))
    assert "80 greedy answers to MT-Bench (17,145 tokens)" in text
    assert "| H | 63 | 2.500 | 2.490 | 0.9960 (0.9900-1.0010) |" in text.splitlines()


def test_drafts_that_know_the_noise(in_results):
    from report_coupled import coupled_drafts_section

    pair = {"alone": 1.5, "coupled": 1.5625, "ratio": 1.0417, "ratio_interval": [1.03, 1.05]}
    row = {"nodes": 8, "one tree": pair, "chosen": pair | {"coupled": 1.6}}
    record = {
        "model": "M", "dtype": "float32", "num_questions": 80, "answer_tokens": 16012,
        "temperature": 0.7, "redrawn": 0.99994, "spread": 2.0, "draft_vocab_size": 12288,
        "heads": {"H": {"rows": [row]}},
    }  # fmt: skip
    text = coupled_drafts_section(write(in_results / "r.json", record))
    assert "drew at temperature 0.7 (16,012 tokens, 99.99% drawn again" in text
    ratio = "1.042 (1.030-1.050)"
    assert f"| H | 8 | 1.500 | 1.562 | {ratio} | 1.500 | 1.600 | {ratio} |" in text.splitlines()
