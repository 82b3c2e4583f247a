"""vLLM's V2 runner on the fall-backs generates what its V1 runner and its kernels do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cpu_cases
import cpu_engine
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, cpu_cases.needs_cpu_build]

HERE = Path(__file__).parent
TIMEOUT_S = 600
# Runners in pairs, for two cores.
PAIRS = (("v1", "v2"), ("v2-ngram", "v2-interpreted"))
# The same float32 logits; log-softmax in another order of summation.
LOGPROB_ATOL = 1e-4


def start(runner: str, model: Path, out: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1" if runner == "v2-interpreted" else "0",
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "cpu_engine.py"), runner, str(model), str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Outputs by runner."""
    folder = tmp_path_factory.mktemp("engines")
    model = folder / "model"
    cpu_engine.make_model(model)
    found = {}
    for pair in PAIRS:
        processes = {runner: start(runner, model, folder / f"{runner}.json") for runner in pair}
        for runner, process in processes.items():
            output, _ = process.communicate(timeout=TIMEOUT_S)
            if process.returncode != 0:
                pytest.fail(f"runner {runner} failed:\n{output[-6000:]}")
            found[runner] = json.loads((folder / f"{runner}.json").read_text())
    return found


def tokens(results: dict, runner: str, batch: str) -> list[list[int]]:
    return results[runner][batch]["tokens"]


def test_the_right_runners_ran(results: dict) -> None:
    modules = {runner: result["runner"] for runner, result in results.items()}
    assert modules.pop("v1") == "vllm.v1.worker.cpu_model_runner"
    assert set(modules.values()) == {"vllm.v1.worker.cpu.model_runner"}


@pytest.mark.parametrize("batch", ["greedy", "greedy, penalties, logprobs"])
@pytest.mark.parametrize("runner", ["v2", "v2-ngram", "v2-interpreted"])
def test_greedy_output_equals_v1(results: dict, runner: str, batch: str) -> None:
    assert tokens(results, runner, batch) == tokens(results, "v1", batch)


@pytest.mark.parametrize("runner", ["v2", "v2-ngram"])
def test_top_k_of_one_is_greedy(results: dict, runner: str) -> None:
    assert tokens(results, runner, "top-k 1") == tokens(results, "v1", "greedy")


@pytest.mark.parametrize("batch", ["seeded", "seeded, penalties, min-p, bias"])
def test_seeded_output_equals_the_kernels(results: dict, batch: str) -> None:
    sampled = tokens(results, "v2", batch)
    assert sampled == tokens(results, "v2-interpreted", batch)
    assert sampled != [ids[:12] for ids in tokens(results, "v1", "greedy")]


@pytest.mark.parametrize("runner", ["v2", "v2-ngram"])
def test_logprobs_equal_v1(results: dict, runner: str) -> None:
    batch = "greedy, penalties, logprobs"
    actual, expected = (
        [entry for rows in results[name][batch]["logprobs"] for row in rows for entry in row]
        for name in (runner, "v1")
    )
    assert len(expected) > 100
    assert [entry[:2] for entry in actual] == [entry[:2] for entry in expected]
    for (*_, value), (*_, reference) in zip(actual, expected, strict=True):
        assert value == pytest.approx(reference, rel=0.0, abs=LOGPROB_ATOL)
