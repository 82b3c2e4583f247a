"""Nodes that pay on a CPU: the choice, and the measurement that it rests on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from vllm_medusa import cpu_costs
from vllm_medusa.cpu_budget import LARGEST_BATCH, LEAST_PROMISE, choose_budget, cost_of
from vllm_medusa.cpu_costs import RowCosts

# Shares of SmolLM2-135M's calibrated tree, best first.
SHARES = [0.468, 0.189, 0.109, 0.080, 0.055, 0.050, 0.038, 0.035, 0.026, 0.026, 0.025, 0.020]
ROWS = cpu_costs.TREE_ROWS
FLAT = dict.fromkeys(ROWS, 1.0)
EACH_ANEW = {m: float(m) for m in ROWS}
# Six at a time, as the row product does it on AVX2.
STAIRS = {m: float(-(-m // 6)) for m in ROWS}


def costs(tree: dict[int, float]) -> RowCosts:
    return RowCosts({1: 1.0}, tree)


def test_free_rows_take_the_whole_tree():
    budget = choose_budget(SHARES, costs(FLAT))
    assert budget.nodes == len(SHARES)
    assert budget.speedup > 1.5


def test_the_first_stair_is_filled():
    assert choose_budget(SHARES, costs(STAIRS)).nodes == 5


def test_rows_that_cost_each_anew_do_not_pay():
    budget = choose_budget(SHARES, costs(EACH_ANEW))
    assert budget.nodes == 1
    assert budget.speedup < LEAST_PROMISE
    # In a batch it can be told: plain decoding.
    assert budget.schedule[-1][2] == 0


@pytest.mark.parametrize("tree", [FLAT, EACH_ANEW, STAIRS], ids=["flat", "anew", "stairs"])
def test_schedule_covers_all_batches_with_shrinking_trees(tree):
    budget = choose_budget(SHARES, costs(tree))
    covered = [b for first, last, _ in budget.schedule for b in range(first, last + 1)]
    assert covered == list(range(1, LARGEST_BATCH + 1))
    nodes = [n for _, _, n in budget.schedule]
    assert nodes[0] == budget.nodes
    assert nodes == sorted(set(nodes), reverse=True)


def test_cost_between_and_beyond_measured_rows():
    table = {1: 1.0, 6: 1.5, 12: 3.0}
    assert [cost_of(table, m) for m in (1, 2, 6, 7, 24)] == [1.0, 1.5, 1.5, 3.0, 6.0]


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measured_costs(dtype, monkeypatch):
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        current_platform.import_kernels()
    monkeypatch.setattr(cpu_costs, "STACK_BYTES", 1 << 20)
    # Microseconds here, beside other tests: order is none of this test's business.
    monkeypatch.setattr(cpu_costs, "MOST_DISORDER", float("inf"))
    measured = cpu_costs.measure_costs(64, dtype, torch.bfloat16, None)
    assert measured.plain[1] == 1.0
    assert tuple(measured.plain) == cpu_costs.PLAIN_ROWS
    assert tuple(measured.tree) == ROWS
    assert all(cost > 0 for part in measured for cost in part.values())
    assert list(measured.tree.values()) == sorted(measured.tree.values())


def test_timings_in_order():
    assert cpu_costs.in_order({1: 2.2, 2: 2.0, 6: 3.0}) == {1: 2.0, 2: 2.0, 6: 3.0}
    with pytest.raises(ValueError, match=r"1 rows took 7\.2 times as long"):
        cpu_costs.in_order({1: 1.0, 2: 0.138, 4: 0.34})


def test_measured_once_and_kept(monkeypatch, tmp_path):
    calls = []

    def run(command, **options):
        calls.append(command)
        record = Path(command[command.index("vllm_medusa.cpu_costs") + 1])
        record.write_text(json.dumps([{"1": 1.0}, {"1": 0.5, "6": 0.75}]))

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        found = cpu_costs.machine_costs(tmp_path, 64, torch.float32, torch.bfloat16)
        assert found == RowCosts({1: 1.0}, {1: 0.5, 6: 0.75})
    assert len(calls) == 1
    # Another dtype, number of threads or compiler is another machine.
    cpu_costs.machine_costs(tmp_path, 64, torch.float32, torch.float32)
    monkeypatch.setenv("OMP_NUM_THREADS", "31")
    cpu_costs.machine_costs(tmp_path, 64, torch.float32, torch.float32)
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_costs.machine_costs(tmp_path, 64, torch.float32, torch.float32)
    assert len(calls) == 4


def test_failed_measurement_chooses_nothing(monkeypatch, tmp_path):
    def run(command, **options):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    assert cpu_costs.machine_costs(tmp_path, 64, torch.float32, torch.float32) is None
