"""`vllm-medusa eval` through a real engine: served equals the simulation on the same answers."""

import json

import pytest
import traffic

from vllm_medusa.cli import main

pytestmark = pytest.mark.vllm

ENGINE = {
    "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 8, "enable_prefix_caching": False,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_served_acceptance_equals_the_simulated(tiny, tmp_path, monkeypatch, capsys, temperature):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt_token_ids": ids, "category": ["even", "odd"][i % 2]}
        for i, ids in enumerate(traffic.prompts(12, seed=3))
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out"
    status = main(
        ["eval", "--model", tiny["model"], "--heads", tiny["heads"], "--prompts", str(prompts),
         "--output", str(output), "--device", "cpu", "--dtype", "float32", "--max-tokens", "60",
         "--tree", "[4, 2, 1]", "--nodes", "16", "--temperature", str(temperature),
         "--engine-args", json.dumps(ENGINE)]
    )  # fmt: skip
    assert status == 0
    record = json.loads((output / "eval.json").read_text())
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
