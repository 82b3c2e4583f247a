"""Tokens that vLLM's kernels draw, with a graph behind the draw: the output is plain vLLM's.

There are no graphs on a CPU: what they would replay runs eagerly, padded like a graph's size.
"""

from __future__ import annotations

import pytest
import traffic

pytestmark = pytest.mark.vllm

ENGINE = {
    "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "seed": 0,
    # Prompts in chunks beside trees; requests wait for others to end.
    "max_num_seqs": 8, "max_num_batched_tokens": 128, "enable_chunked_prefill": True,
}  # fmt: skip
# Of float32 log probabilities of rows that other rows stood beside.
ROUNDING = 1e-4
KINDS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.9, "top_p": 0.95, "logit_bias": {"7": 3.0, "11": -100.0}},
    {"allowed_token_ids": list(range(3, 40))},
    {"min_tokens": 20, "stop_token_ids": [5, 6, 7], "ignore_eos": False},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 3},
]


def batch(kinds: list[dict], count: int) -> dict:
    """Requests of all kinds side by side that start and end apart."""
    common = {"temperature": 0.0, "ignore_eos": True}
    return {
        "prompts": traffic.prompts(count, seed=11),
        "sampling": [
            common | {"max_tokens": 24 + 5 * i, "seed": 100 + i} | kinds[i % len(kinds)]
            for i in range(count)
        ],
    }


def token_ids(result: dict) -> list:
    return [request["token_ids"] for request in result["batches"][0]]


def logprobs(result: dict) -> list:
    """Token, log probability and rank of every candidate that was returned."""
    requests = [request["logprobs"] for request in result["batches"][0]]
    return [row for rows in requests if rows is not None for position in rows for row in position]


def speculation(tiny: dict, tree: str) -> dict:
    config = {"method": "medusa", "model": tiny["heads"], "tree": tree}
    return {"speculative_config": config | {"num_speculative_tokens": 20}}


@pytest.mark.parametrize("tree", ["static", "dynamic"])
def test_mixed_batches_equal_plain_vllm_and_the_launches(tiny, run_job, tree):
    engine, requests = {"model": tiny["model"], **ENGINE}, batch(KINDS, 20)
    plain = run_job(engine, [requests], plain_v2=True)
    options = {"whole_steps": True, "compare_drawn_steps": True}
    result = run_job(engine | speculation(tiny, tree), [requests], **options)
    assert token_ids(result) == token_ids(plain)
    expected, found = logprobs(plain), logprobs(result)
    assert [row[::2] for row in found] == [row[::2] for row in expected] != []
    assert [row[1] for row in found] == pytest.approx([row[1] for row in expected], abs=ROUNDING)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    steps = result["drawn_steps"]
    assert [step for step in steps if step["differ"]] == []
    assert sum(step["in place"] for step in steps) > 20
    # Prompts alone, and beside trees.
    assert any(step["with drafts"] == 0 for step in steps)
    assert any(0 < step["with drafts"] < step["requests"] for step in steps)


# 25 s each; which requests these are is tested without an engine, too (test_graph_requests.py).
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        {"repetition_penalty": 1.3},
        {"prompt_logprobs": 1},
        {"extra_args": {"medusa_acceptance": "typical"}},
    ],
    ids=["looks back", "prompt's log probabilities", "another walk"],
)
def test_what_needs_more_than_a_draw_keeps_its_batches_out(tiny, run_job, kind):
    # It comes first and ends last: no step is without it.
    requests = batch([KINDS[3]], 6)
    requests["sampling"][0] |= kind | {"max_tokens": 100}
    engine = {"model": tiny["model"], **ENGINE, "max_num_batched_tokens": 1024}
    options = {"whole_steps": True, "compare_drawn_steps": True}
    result = run_job(engine | speculation(tiny, "static"), [requests], **options)
    assert result["drawn_steps"] == [] and result["whole_steps"] == 0
    assert [len(ids[0]) for ids in token_ids(result)][1:] == [29, 34, 39, 44, 49]
