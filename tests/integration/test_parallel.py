"""Tensor and pipeline parallelism: several workers return what one worker returns."""

from __future__ import annotations

import re

import cluster_plugin
import dummy_steps
import families
import pytest
import traffic
from test_families import ENGINE, token_ids

# Each engine starts two further processes, which import vLLM anew.
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NODES = 12
# vLLM's own words, by executor; its log names the process.
DIED = "died|dead|failed|cancelled"
TWO = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}


def batches(count: int = 8) -> list[dict]:
    """Few requests, so that trees of one batch end at different lengths."""
    prompts = traffic.prompts(count, seed=5, high=40)
    return [
        {"prompts": prompts, "sampling": traffic.sampling(kind, count, max_tokens=32)}
        for kind in ("greedy", "seeded")
    ]


def job(tiny: dict[str, str], **options) -> dict:
    """A Medusa engine with further options."""
    config = {"method": "medusa", "model": tiny["heads"], "num_speculative_tokens": NODES}
    config["tree"] = "static"  # the same for one worker, which would choose its trees
    engine = {"model": tiny["model"], **ENGINE, "speculative_config": config, **options}
    return {"engine": engine, "batches": batches(), "async": True}


@pytest.fixture(scope="module")
def results(tiny, run_series, cluster_env) -> dict[str, dict]:
    jobs = {"one": job(tiny)}
    jobs["plain"] = {**job(tiny, speculative_config=None), "plain_v2": True}
    jobs |= {name: job(tiny, **options) for name, options in TWO.items()}
    return run_series(jobs, cluster_env)


@pytest.mark.parametrize("kind", TWO)
def test_two_workers_return_what_one_returns(results, kind):
    assert token_ids(results[kind]) == token_ids(results["one"]) == token_ids(results["plain"])
    # The same trees were drafted and the same paths accepted.
    assert results[kind]["counters"] == results["one"]["counters"]
    assert min(results[kind]["accepted"]) > 50


@pytest.mark.parametrize(
    ("misbehaviour", "kind", "expected"),
    [
        (
            "rank 1 drafts something else",
            "tensor",
            r"draft tokens of step \d+ differ between tensor-parallel rank [01] and rank",
        ),
        ("rank 1 dies", "tensor", DIED),
    ],
)
def test_what_goes_wrong_on_a_rank_ends_the_engine(
    tiny, run_series, cluster_env, misbehaviour, kind, expected
):
    env = cluster_env | {cluster_plugin.MISBEHAVIOUR: misbehaviour}
    error = run_series({kind: job(tiny, **TWO[kind])}, env)[kind]["error"]
    assert re.search(expected, error), error


def test_comparison_sees_a_stage_that_does_not_compact(tiny, run_series, cluster_env, results):
    env = cluster_env | {cluster_plugin.MISBEHAVIOUR: "earlier stages do not compact"}
    broken = run_series({"pipeline": job(tiny, **TWO["pipeline"])}, env)["pipeline"]
    assert token_ids(broken) != token_ids(results["one"])


@pytest.mark.parametrize("tree", ["static", "dynamic"])
def test_two_replicas_return_what_one_returns(tiny, run_replicas, cluster_env, results, tree):
    """The last batch is one request: the other replica has nothing to do meanwhile."""
    wanted = job(tiny, data_parallel_size=2)
    wanted["engine"]["speculative_config"]["tree"] = tree
    first = wanted["batches"][0]
    alone = {"prompts": first["prompts"][:1], "sampling": first["sampling"][:1]}
    found = run_replicas(wanted | {"batches": [*wanted["batches"], alone]}, cluster_env)
    expected = token_ids(results["one"])
    assert token_ids(found) == [*expected, expected[0][:1]]
    assert sorted(found["accepted"]) == ["0", "1"] and min(found["accepted"].values()) > 50


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    """Paths of a tiny mixture of experts and of heads fitted to it."""
    root = tmp_path_factory.mktemp("experts")
    families.fit_family_heads(families.make_family("mixtral", root / "model"), root / "heads")
    return {"model": str(root / "model"), "heads": str(root / "heads")}


def expert_env(cluster_env: dict[str, str], folder) -> dict[str, str]:
    """With the collectives that vLLM lacks on a CPU, and a watch on dummy steps."""
    return cluster_env | {
        cluster_plugin.EXPERTS_VARIABLE: "1",
        dummy_steps.VARIABLE: str(folder),
    }


def test_experts_of_two_replicas_return_what_one_worker_returns(
    experts, run_series, run_replicas, cluster_env, tmp_path
):
    """Experts are dealt out to the ranks; the last batches are one request, so one rank idles."""
    wanted = job(experts, data_parallel_size=2, enable_expert_parallel=True)
    first = wanted["batches"][0]
    alone = {"prompts": first["prompts"][:1], "sampling": first["sampling"][:1]}
    wanted["batches"] = [*wanted["batches"], alone, first]
    found = run_replicas(wanted, expert_env(cluster_env, tmp_path))
    expected = run_series({"one": job(experts)}, cluster_env)["one"]
    greedy, seeded = token_ids(expected)
    assert token_ids(found) == [greedy, seeded, greedy[:1], greedy]
    # These heads know less than those of the dense model.
    assert sorted(found["accepted"]) == ["0", "1"] and min(found["accepted"].values()) > 10
    seen = dummy_steps.reports(tmp_path).values()
    assert sum(report["steps"] for report in seen) > 10
    for report in seen:
        assert report["trees"] == report["drafted"] == report["steps"]
        assert report["changed"] == []
