"""Compiled row kernels in a whole engine: they run, they change no token, and may be missing."""

from __future__ import annotations

import pytest
import traffic

pytestmark = pytest.mark.vllm

ENGINE = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 8}
NUM_LAYERS = 2
# Per layer: QKV, output, gate and up, down.
PRODUCTS_PER_LAYER = 4


@pytest.fixture(scope="module")
def batches() -> list[dict]:
    return [
        {"prompts": traffic.prompts(count, seed=3), "sampling": traffic.sampling("greedy", count)}
        for count in (1, 6)
    ]


@pytest.fixture(scope="module")
def plain(tiny, run_job, batches) -> dict:
    return run_job({"model": tiny["model"], **ENGINE}, batches, count_row_products=True)


def medusa(tiny: dict) -> dict:
    return {"model": tiny["model"], **ENGINE, "speculative_config": {
        "method": "medusa", "model": tiny["heads"]}}  # fmt: skip


def token_ids(result: dict) -> list:
    return [[r["token_ids"] for r in batch] for batch in result["batches"]]


def test_the_compiled_kernels_run(tiny, run_job, batches, plain):
    result = run_job(medusa(tiny), batches, count_row_products=True)
    assert token_ids(result) == token_ids(plain)
    steps = result["counters"]["vllm:spec_decode_num_drafts"] / 6
    counts = result["row_products"]
    assert counts["products"] >= steps * NUM_LAYERS * PRODUCTS_PER_LAYER
    assert counts["tree_attention"] >= steps * NUM_LAYERS


def test_plain_vllm_keeps_its_own(plain):
    assert plain["row_products"] == {"products": 0, "tree_attention": 0}


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"], ids=["none", "fails"])
def test_without_a_compiler_onednn_serves(tiny, run_job, batches, plain, compiler):
    result = run_job(medusa(tiny), batches, env={"CXX": compiler}, count_row_products=True)
    assert token_ids(result) == token_ids(plain)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert result["row_products"] == {"products": 0, "tree_attention": 0}


@pytest.mark.slow
def test_compiled_graphs_of_other_products_are_not_taken(tiny, run_job, batches, plain, tmp_path):
    """vLLM keeps compiled graphs; one with row products must not serve where there are none."""
    engine = medusa(tiny) | {"enforce_eager": False}
    for broken in (None, None, "row kernels"):
        options = {"count_row_products": True, "break": broken}
        result = run_job(engine, batches, env={"VLLM_CACHE_ROOT": str(tmp_path)}, **options)
        assert token_ids(result) == token_ids(plain)
        assert (result["row_products"]["products"] > 0) == (broken is None)
