"""Output under speculation equals output without it, token for token, in float32.

The baseline is stock vLLM: its V1 CPU runner for greedy decoding, its V2 runner
for seeded sampling (the two runners draw different noise from one seed).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import tiny as tiny_model
import traffic

pytestmark = pytest.mark.vllm

ENGINE = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "seed": 0}
# Small enough that requests are preempted and prompts arrive in chunks.
TIGHT = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 128,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 20,
    "block_size": 32,
}
SCHEDULE = [[1, 2, 30], [3, 6, 12], [7, 12, 5], [13, 20, 1], [21, 999, 0]]
CUT_BY_BATCH = {"num_speculative_tokens": 30, "num_speculative_tokens_per_batch_size": SCHEDULE}
# Ancestor masks of two words.
WIDE_TREE = {"tree": [4, 4, 5], "num_speculative_tokens": 100}
NUM_HEADS = 3
WIDE = {"max_num_seqs": 32, "enable_prefix_caching": True}


def token_ids(result: dict) -> list:
    return [[r["token_ids"] for r in batch] for batch in result["batches"]]


def medusa(tiny: dict, **extra) -> dict:
    """One tree, unless ``extra`` asks for others; None is what users get who ask for nothing."""
    config = {"method": "medusa", "model": tiny["heads"], "tree": "static"}
    return {"speculative_config": config | extra}


@pytest.fixture(scope="module")
def batches() -> list[dict]:
    """208 prompts x up to 128 tokens in batches of 1, 7, 40 and 160."""
    made = []
    for kind, count in (("greedy", 1), ("greedy", 7), ("greedy", 40), ("greedy", 160)):
        made.append(
            {
                "prompts": traffic.prompts(count, seed=count),
                "sampling": traffic.sampling(kind, count),
            }
        )
    return made


@pytest.fixture(scope="module")
def seeded_batches() -> list[dict]:
    return [
        {
            "prompts": traffic.prompts(count, seed=count + 1),
            "sampling": traffic.sampling(kind, count),
        }
        for kind, count in (("seeded", 1), ("seeded", 120), ("mixed", 96))
    ]


@pytest.fixture(scope="module")
def plain(tiny, run_job, batches) -> dict:
    return run_job({"model": tiny["model"], **ENGINE, **WIDE}, batches)


@pytest.fixture(scope="module")
def plain_v2(tiny, run_job, seeded_batches) -> dict:
    return run_job({"model": tiny["model"], **ENGINE, **WIDE}, seeded_batches, plain_v2=True)


@pytest.mark.parametrize(
    "extra, limits, num_batches",
    [
        ({"tree": None}, WIDE, 4),
        ({"num_speculative_tokens": 63}, TIGHT, 4),
        (CUT_BY_BATCH, WIDE, 4),
        (WIDE_TREE, TIGHT, 3),
        ({"tree": [4, 2, 1]}, TIGHT, 3),
        ({"tree": [[0], [0, 0], [0, 0, 0]]}, WIDE, 3),
        ({"tree": [[0]]}, WIDE, 3),
        ({"tree": "dynamic", "num_speculative_tokens": 63}, TIGHT, 3),
        ({"tree": "dynamic", "num_speculative_tokens": 63, "prompt_lookup": 0}, TIGHT, 3),
    ],
    ids=["default", "63 nodes, preempted and chunked", "cut by batch size", "100 nodes", "widths",
         "chain", "one node", "chosen trees, preempted and chunked", "chosen from heads only"],
)  # fmt: skip
def test_greedy_equals_stock_v1_runner(tiny, run_job, batches, plain, extra, limits, num_batches):
    engine = {"model": tiny["model"], **ENGINE, **limits, **medusa(tiny, **extra)}
    result = run_job(engine, batches[:num_batches], count_mixed_steps=True)
    assert token_ids(result) == token_ids(plain)[:num_batches]
    counters = result["counters"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    # The tree really ran, and drafts really were accepted.
    assert accepted > 0.2 * counters["vllm:spec_decode_num_drafts"]
    if limits is TIGHT:
        assert counters["vllm:num_preemptions"] > 0
        assert counters["vllm:prefix_cache_hits"] > 0
        assert result["mixed_steps"] > 20
    assert result["runner"].endswith("MedusaCPUModelRunner")
    chooses = extra.get("tree", "static") in (None, "dynamic")
    assert (result["distinct_trees"] > 1) == chooses
    # Paths that only the history can have proposed: deeper than there are heads.
    deep = counters["vllm:spec_decode_num_accepted_tokens_per_pos"][NUM_HEADS:]
    assert bool(sum(deep)) == (chooses and extra.get("prompt_lookup") != 0)


@pytest.fixture(scope="module")
def seeded(tiny, run_job, seeded_batches) -> Callable[..., dict]:
    """Results with Medusa, by its tree and whether drafts know the sampler's noise."""

    @functools.cache
    def run(tree: str, coupled: bool) -> dict:
        limits = TIGHT if tree == "static" and not coupled else WIDE
        extra = {"num_speculative_tokens": 63, "tree": tree, "coupled_drafts": coupled}
        engine = {"model": tiny["model"], **ENGINE, **limits, **medusa(tiny, **extra)}
        return run_job(engine, seeded_batches)

    return run


@pytest.mark.parametrize(
    "tree, coupled",
    [("static", False), ("static", True), ("dynamic", True)],
    ids=["alone, preempted and chunked", "coupled", "coupled, chosen trees"],
)
def test_seeded_sampling_equals_stock_v2_runner(seeded, plain_v2, tree, coupled):
    result = seeded(tree, coupled)
    assert plain_v2["runner"] == "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
    assert token_ids(result) == token_ids(plain_v2)
    assert result["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0


def test_drafts_that_know_the_noise_are_accepted_more_often(seeded):
    alone, coupled = (
        result["counters"]["vllm:spec_decode_num_accepted_tokens"]
        / result["counters"]["vllm:spec_decode_num_drafts"]
        for result in (seeded("static", False), seeded("static", True))
    )
    assert coupled > 1.02 * alone, (alone, coupled)


@pytest.mark.parametrize(
    "limits, extra",
    [
        (WIDE, CUT_BY_BATCH),
        (TIGHT, {"num_speculative_tokens": 63}),
        pytest.param(
            WIDE,
            {**WIDE_TREE, "num_speculative_tokens_per_batch_size": [[1, 1, 100], [2, 99, 40]]},
            marks=pytest.mark.slow,
        ),
        (WIDE, {**CUT_BY_BATCH, "tree": "dynamic"}),
    ],
    ids=["cut by batch size", "whole trees, tight", "100 nodes",
         "chosen trees, cut by batch size"],
)  # fmt: skip
def test_step_of_the_verification_graphs_equals_stock(
    tiny, run_job, batches, plain, seeded_batches, plain_v2, limits, extra
):
    """What a GPU replays after the forward pass, padded requests included."""
    engine = {"model": tiny["model"], **ENGINE, **limits, **medusa(tiny, **extra)}
    result = run_job(engine, batches[:3] + seeded_batches[:2], whole_steps=True)
    assert token_ids(result) == token_ids(plain)[:3] + token_ids(plain_v2)[:2]
    assert result["whole_steps"] > 50
    # Prompts whole and in chunks, alone and beside trees.
    assert 3 <= result["laid_out_steps"] < result["whole_steps"]


@pytest.mark.parametrize(
    "tree", [[4, 3, 2], "dynamic"], ids=["one tree", "chosen with what the history proposes"]
)
def test_sequential_heads_draft_level_by_level(tiny, run_job, batches, plain, tmp_path, tree):
    """Random heads: what they draft does not matter to the output, only to the speed."""
    import torch

    from vllm_medusa.checkpoint import save_heads
    from vllm_medusa.head_weights import HeadSpec
    from vllm_medusa.heads import MedusaHeads

    torch.manual_seed(0)
    spec = HeadSpec(
        3, 1, tiny_model.HIDDEN, vocab_size=tiny_model.VOCAB, dtype=torch.float32, sequential=True
    )
    heads = MedusaHeads(spec)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_heads(heads.to_weights(), tmp_path, format="M")
    engine = {"model": tiny["model"], **ENGINE, **WIDE}
    engine["speculative_config"] = {"method": "medusa", "model": str(tmp_path), "tree": tree}
    engine["speculative_config"]["num_speculative_tokens"] = 28
    result = run_job(engine, batches[:3], whole_steps=True)
    assert token_ids(result) == token_ids(plain)[:3]
    counters = result["counters"]
    assert counters["vllm:spec_decode_num_accepted_tokens"] > 0
    assert result["whole_steps"] > 50
    deep = counters["vllm:spec_decode_num_accepted_tokens_per_pos"][3:]
    assert bool(sum(deep)) == (tree == "dynamic")


def test_comparison_sees_a_missing_compaction(tiny, run_job, batches, plain):
    engine = {"model": tiny["model"], **ENGINE, **WIDE, **medusa(tiny, num_speculative_tokens=63)}
    broken = run_job(engine, batches[:2], **{"break": "compaction"})
    assert token_ids(broken) != token_ids(plain)[:2]


def test_output_up_to_the_model_length(tiny, run_job):
    """The tree is cut near max_model_len; every token up to the limit still agrees."""
    batch = {
        "prompts": traffic.prompts(6, seed=5, low=20, high=60),
        "sampling": [{"temperature": 0.0, "max_tokens": 500, "ignore_eos": True}] * 6,
    }
    limits = {**WIDE, "max_model_len": 160}
    plain = run_job({"model": tiny["model"], **ENGINE, **limits}, [batch])
    result = run_job({"model": tiny["model"], **ENGINE, **limits, **medusa(tiny)}, [batch])
    assert token_ids(result) == token_ids(plain)
    lengths = [
        len(ids) + len(out["token_ids"][0])
        for ids, out in zip(batch["prompts"], result["batches"][0], strict=True)
    ]
    assert max(lengths) == 160


def test_bias_penalties_and_stops_side_by_side(tiny, run_job):
    """Rows laid out as chains beside rows that stay as they are."""
    params = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"logit_bias": {"7": 3.0, "11": -100.0}},
        {"min_tokens": 20, "stop_token_ids": [5, 6, 7]},
        {"allowed_token_ids": list(range(3, 40))},
        {},
    ]
    batch = {
        "prompts": traffic.prompts(len(params), seed=9),
        "sampling": [
            {"temperature": 0.0, "max_tokens": 64, "ignore_eos": True, **p} for p in params
        ],
    }
    plain = run_job({"model": tiny["model"], **ENGINE, **WIDE}, [batch], plain_v2=True)
    result = run_job({"model": tiny["model"], **ENGINE, **WIDE, **medusa(tiny)}, [batch])
    assert token_ids(result) == token_ids(plain)


# What stock vLLM takes under speculation too (it refuses min_p and logit_bias there).
ALL_FEATURES = [
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"min_tokens": 4, "stop_token_ids": [5]},
    {"temperature": 0.8, "seed": 1, "top_k": 20, "top_p": 0.9},
    {"logprobs": 3},
    {"prompt_logprobs": 2},
    {"allowed_token_ids": list(range(3, 40))},
]


def test_kernels_get_the_dtypes_of_stock_speculation(tiny, run_job):
    """vLLM's Triton kernels compile for the dtypes of vLLM's own speculation.

    Fall-backs take any; on a GPU an int64 where vLLM passes int32 fails to compile.
    """
    batch = {
        "prompts": [[5, 6, 7, 5, 6, 7, 5, 6, 7]] * len(ALL_FEATURES),
        "sampling": [
            {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **p} for p in ALL_FEATURES
        ],
    }
    ngram = {"method": "ngram_gpu", "num_speculative_tokens": 4, "prompt_lookup_max": 2}
    engine = {"model": tiny["model"], **ENGINE, **WIDE}
    stock = run_job(
        {**engine, "speculative_config": {**ngram, "prompt_lookup_min": 1}},
        [batch],
        plain_v2=True,
        record_launches=True,
    )
    ours = run_job({**engine, **medusa(tiny)}, [batch], record_launches=True)
    compared = set(stock["launches"]) & set(ours["launches"])
    assert {"gumbel_sample_kernel", "penalties_kernel", "post_update_kernel"} <= compared
    for kernel in compared:
        assert ours["launches"][kernel] == stock["launches"][kernel], kernel


# float32 logits of two attention implementations differ by a few ulp of the largest.
LOGPROB_TOLERANCE = 2e-4


def test_logprobs_are_those_of_the_accepted_rows(tiny, run_job):
    batch = {
        "prompts": traffic.prompts(8, seed=3),
        "sampling": [{"temperature": 0.0, "max_tokens": 48, "ignore_eos": True, "logprobs": 3}] * 8,
    }
    plain = run_job({"model": tiny["model"], **ENGINE, **WIDE}, [batch], plain_v2=True)
    result = run_job({"model": tiny["model"], **ENGINE, **WIDE, **medusa(tiny)}, [batch])
    assert token_ids(result) == token_ids(plain)
    for left, right in zip(plain["batches"][0], result["batches"][0], strict=True):
        for a, b in zip(left["logprobs"], right["logprobs"], strict=True):
            assert [(t, rank) for t, _, rank in a] == [(t, rank) for t, _, rank in b]
            for (_, x, _), (_, y, _) in zip(a, b, strict=True):
                assert abs(x - y) < LOGPROB_TOLERANCE


def test_counters_count_depth_not_nodes(tiny, run_job, batches):
    engine = {"model": tiny["model"], **ENGINE, **WIDE, **medusa(tiny, num_speculative_tokens=63)}
    counters = run_job(engine, batches[:2])["counters"]
    drafts = counters["vllm:spec_decode_num_drafts"]
    per_position = counters["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert len(per_position) == 3
    assert sum(per_position) == counters["vllm:spec_decode_num_accepted_tokens"]
    assert per_position == sorted(per_position, reverse=True)
    assert counters["vllm:spec_decode_num_draft_tokens"] <= 3 * drafts
