"""Other architectures: output under speculation equals vLLM's own, token for token, in float32.

Each tiny model runs greedy and seeded, with heads that know nothing and with heads fitted
to it, whose drafts are accepted often enough that every step moves cache rows.
"""

from __future__ import annotations

import families
import pytest
import traffic

pytestmark = pytest.mark.vllm

ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "seed": 0,
    "max_num_seqs": 16,
    # Small enough that prompts arrive in chunks.
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 200,
    "block_size": 32,
}
NODES = 40
# One of each kind: rotary, windowed with soft caps, mixture of experts, learned positions,
# multi-dimensional rotary.
REPRESENTATIVES = ("qwen3", "gemma2", "mixtral", "gpt2", "mrope")
FAMILIES = [
    pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.long)
    for name in families.CONFIGS
]
# Fitted heads accept at least this many tokens per tree (0.15 to 1.2 were seen).
LEAST_ACCEPTED = 0.1


def batches() -> list[dict]:
    """16 prompts x 48 tokens, greedy and seeded."""
    return [
        {
            "prompts": traffic.prompts(16, seed=2, high=64),
            "sampling": traffic.sampling(kind, 16, max_tokens=48),
        }
        for kind in ("greedy", "seeded")
    ]


def family_jobs(name: str, root) -> dict[str, dict]:
    """The engines of one family: plain, uninformed heads, fitted heads."""
    model = families.make_family(name, root / name / "model")
    families.fit_family_heads(model, root / name / "fitted")
    families.random_heads(root / name / "random")
    engine = {"model": str(root / name / "model"), **ENGINE}
    jobs = {f"{name} plain": {"engine": engine, "batches": batches(), "plain_v2": True}}
    for heads in ("random", "fitted"):
        config = {"method": "medusa", "model": str(root / name / heads)}
        config["num_speculative_tokens"] = NODES
        jobs[f"{name} {heads}"] = {
            "engine": {**engine, "speculative_config": config},
            "batches": batches(),
        }
    return jobs


@pytest.fixture(scope="module")
def results(request, run_series, tmp_path_factory) -> dict[str, dict]:
    """All engines of the families that this run selects, in one process."""
    root = tmp_path_factory.mktemp("families")
    selected = {
        item.callspec.params["family"]
        for item in request.session.items
        if item.fspath == request.path and "family" in getattr(item, "callspec", item).params
    }
    jobs: dict[str, dict] = {}
    for name in families.CONFIGS:
        if name in selected:
            jobs |= family_jobs(name, root)
    broken = [name for name in jobs if name.endswith("fitted")]
    # Baselines first; what breaks the plugin last.
    order = sorted(jobs, key=lambda name: not name.endswith("plain"))
    series = {name: jobs[name] for name in order}
    series |= {
        name.replace("fitted", "without compaction"): jobs[name] | {"break": "compaction"}
        for name in broken
    }
    if "mrope fitted" in jobs:
        series["mrope, linear positions"] = jobs["mrope fitted"] | {"break": "rope"}
    return run_series(series)


def token_ids(result: dict) -> list:
    assert "error" not in result, result["error"]
    return [[output["token_ids"] for output in batch] for batch in result["batches"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_identity(results, family):
    expected = token_ids(results[f"{family} plain"])
    assert results[f"{family} plain"]["runner"] == "CPUModelRunner"
    for heads in ("random", "fitted"):
        assert token_ids(results[f"{family} {heads}"]) == expected, heads
    counters = results[f"{family} fitted"]["counters"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > LEAST_ACCEPTED * counters["vllm:spec_decode_num_drafts"]


@pytest.mark.parametrize("family", FAMILIES)
def test_comparison_sees_a_missing_compaction(results, family):
    broken = results[f"{family} without compaction"]
    assert token_ids(broken) != token_ids(results[f"{family} plain"])


@pytest.mark.parametrize("family", ["mrope"])
def test_comparison_sees_linear_rope_positions(results, family):
    broken = results["mrope, linear positions"]
    assert token_ids(broken) != token_ids(results[f"{family} plain"])
