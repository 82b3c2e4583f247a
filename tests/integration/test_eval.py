"""`vllm-medusa eval` through a real engine: served equals the simulation on the same answers."""

import json
import shutil

import pytest
import traffic

from vllm_medusa.cli import main

pytestmark = pytest.mark.vllm

ENGINE = {
    "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 8, "enable_prefix_caching": False,
}  # fmt: skip


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A prompt file of two categories, and the environment of a small CPU engine."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rows = [
        {"prompt_token_ids": ids, "category": ["even", "odd"][i % 2]}
        for i, ids in enumerate(traffic.prompts(12, seed=3))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def evaluate(tiny, heads, prompts, output, *options):
    status = main(
        ["eval", "--model", tiny["model"], "--heads", str(heads), "--prompts", prompts,
         "--output", str(output), "--device", "cpu", "--dtype", "float32", "--max-tokens", "60",
         "--engine-args", json.dumps(ENGINE), *options]
    )  # fmt: skip
    assert status == 0
    return json.loads((output / "eval.json").read_text())


@pytest.mark.parametrize("temperature", ["0", pytest.param("0.8", marks=pytest.mark.slow)])
def test_served_acceptance_equals_the_simulated(tiny, tmp_path, prompts, capsys, temperature):
    output = tmp_path / "out"
    record = evaluate(tiny, tiny["heads"], prompts, output, "--tree", "[4, 2, 1]", "--nodes",
                      "16", "--temperature", temperature)  # fmt: skip
    served, simulated = record["served"], record["simulated"]
    # float32 on both sides, no near ties in this model: not 2 % but equal.
    assert simulated["answers_with_equal_steps"] == served["all"]["answers"] == 12
    assert simulated["relative_difference"] == 0
    assert simulated["accepted_by_depth"] == pytest.approx(served["all"]["accepted_by_depth"])
    assert simulated["unexplained_steps"] == 0
    assert served["all"]["tokens_per_step"] > 1.05
    assert set(served["categories"]) == {"even", "odd"}
    assert record["tree"]["nodes"] == 16
    assert (output / "tree.png").exists() and (output / "acceptance.png").exists()
    assert "simulated on the same answers" in capsys.readouterr().out


@pytest.mark.slow
def test_calibrated_tree_serves_what_it_promises(tiny, tmp_path, prompts):
    heads = tmp_path / "heads"
    shutil.copytree(tiny["heads"], heads)
    status = main(
        ["calibrate", "--model", tiny["model"], "--heads", str(heads), "--prompts", prompts,
         "--device", "cpu", "--dtype", "float32", "--max-tokens", "60", "--num-nodes", "12",
         "--max-rank", "8", "--engine-args", json.dumps(ENGINE)]
    )  # fmt: skip
    assert status == 0
    tree = json.loads((heads / "tree.json").read_text())
    record = evaluate(tiny, heads, prompts, tmp_path / "out", "--nodes", "12")
    assert record["tree"]["paths"] == tree["paths"]
    served = record["served"]["all"]["tokens_per_step"]
    # The same greedy answers, so even the promise of tree.json is exact but for its rounding.
    assert served == pytest.approx(tree["expected_tokens_per_step"], abs=1e-4)
    assert served == pytest.approx(record["predicted"]["from_calibration_answers"], abs=1e-4)
    promised = record["predicted"]["by_depth_from_calibration_answers"]
    assert record["served"]["all"]["accepted_by_depth"] == pytest.approx(promised, abs=1e-4)
    each = tree["tokens_per_step_by_nodes"]
    assert len(each) == 12 and each == sorted(each)
