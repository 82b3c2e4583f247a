"""The benchmark of a host with two GPUs: what needs none of them."""

from __future__ import annotations

import gzip
import json

import pytest

COMMAND = ["--model", "M", "--heads", "H", "--out"]


@pytest.fixture
def bench(benchmarks):
    import bench_cluster

    return bench_cluster


def test_dry_run_names_every_engine(bench, tmp_path, capsys):
    bench.main([*COMMAND, str(tmp_path / "r.json"), "--dry-run", "--executor", "mp"])
    lines = capsys.readouterr().out.splitlines()
    engines = {name: json.loads(text) for name, text in (line.split(": ", 1) for line in lines)}
    assert list(engines) == ["tp1 plain", "tp1 medusa", "tp2 plain", "tp2 medusa",
                             "pp2 plain", "pp2 medusa"]  # fmt: skip
    assert engines["pp2 medusa"]["pipeline_parallel_size"] == 2
    assert engines["tp2 medusa"]["tensor_parallel_size"] == 2
    assert engines["tp2 medusa"]["speculative_config"]["model"] == "H"
    assert "speculative_config" not in engines["tp2 plain"]
    assert not (tmp_path / "r.json").exists()


def run(tokens: list[int], histograms: list, seconds: float) -> dict:
    """A round in which requests returned so many tokens."""
    answers = [
        {"token_ids": [7] * count, "accepted_histogram": histogram}
        for count, histogram in zip(tokens, histograms, strict=True)
    ]
    return {"answers": answers, "seconds": seconds}


def test_rates_and_steps(bench):
    plain = bench.summarise([run([10, 10], [None, None], 2.0)], 2)
    assert plain["tokens_per_s"]["median"] == 10.0
    assert plain["step_ms"]["median"] == pytest.approx(200.0)
    # Four trees: two accepted nothing, two accepted two tokens each; then 1 + 4 + 4 tokens.
    medusa = bench.summarise([run([9], [[2, 0, 2]], 1.0)], 1)
    assert medusa["tokens_per_step"]["median"] == pytest.approx(9 / 5)
    assert medusa["step_ms"]["median"] == pytest.approx(200.0)


def test_comparison_with_one_gpu(bench):
    def entry(rate):
        return {"results": [{"concurrency": 1, "tokens_per_s": {"median": rate}}]}

    rates = {"tp1 plain": 10.0, "tp1 medusa": 20.0, "tp2 plain": 15.0, "tp2 medusa": 28.5}
    entries = {name: entry(rate) for name, rate in rates.items()}
    same = {"1": [[1, 2], [3]]}
    answers = dict.fromkeys(rates, same) | {"tp2 medusa": {"1": [[1, 2], [4]]}}
    found = bench.compare(entries, answers)
    assert found["tp1"]["speedup"] == {1: 2.0} and found["tp2"]["speedup"] == {1: 1.9}
    assert found["tp2"]["medusa_equals_one_gpu"] == {"1": {"equal": 1, "of": 2}}
    assert found["tp2"]["plain_equals_one_gpu"] == {"1": {"equal": 2, "of": 2}}
    assert "pp2" not in found


def test_share_of_collectives(bench, tmp_path):
    events = [
        {"cat": "kernel", "name": "ncclDevKernel_AllReduce_Sum_bf16", "dur": 30},
        {"cat": "kernel", "name": "void vllm::cross_device_reduce_1stage<...>", "dur": 10},
        {"cat": "kernel", "name": "gemm", "dur": 160},
        {"cat": "cpu_op", "name": "nccl:all_reduce", "dur": 999},
    ]
    assert bench.collective_share(tmp_path) is None
    with gzip.open(tmp_path / "rank0.1.pt.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert bench.collective_share(tmp_path)["share"] == pytest.approx(0.2)


def test_another_record_is_not_completed(bench, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"settings": {"model": "other"}, "engines": []}))
    with pytest.raises(SystemExit, match="made with other settings"):
        bench.main([*COMMAND, str(path), "--executor", "mp"])
