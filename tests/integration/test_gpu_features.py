"""Features that vLLM has on a GPU only: sleep, its own offloading copies, some weight formats."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import tiny as tiny_model
import traffic
import variants

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

NODES = 40
# Sizes that GPU kernels take: FlashAttention's heads, and tiles of four-bit weights.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 256,
    "seed": 0,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    # What is computed again after a wake-up is to come from the model, not from a cache.
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 2**27,
    "gpu_memory_utilization": 0.3,
}
OFFLOADING = {
    "enable_prefix_caching": True,
    # Blocks of 16 tokens for a third of what eight requests hold at their end.
    "num_gpu_blocks_override": 30,
    "kv_transfer_config": {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 2**28, "offload_prompt_only": False},
    },
}
# Log probabilities that bfloat16 logits of this model cannot tell apart.
TIE = 0.25


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, str]:
    """A tiny model, one with a vocabulary that vLLM need not pad, and heads."""
    root = tmp_path_factory.mktemp("model")
    families.fit_family_heads(tiny_model.make_model(root / "model", **SIZES), root / "heads")
    tiny_model.make_model(root / "wide", **SIZES, vocab_size=128)
    families.random_heads(root / "random", size=SIZES["hidden_size"])
    return {path.name: str(path) for path in root.iterdir()}


def batch(prompts: list[list[int]] | None = None, **options) -> dict:
    """Eight greedy requests that tell the two likeliest tokens of every step."""
    params = traffic.sampling("greedy", 8, max_tokens=48)
    return {
        "prompts": prompts or traffic.prompts(8, seed=2, high=64),
        "sampling": [one | {"logprobs": 2} for one in params],
        **options,
    }


def speculation(heads: str) -> dict:
    config = {"method": "medusa", "model": heads, "num_speculative_tokens": NODES}
    return {"speculative_config": config}


def assert_alike(expected: list[dict], found: list[dict]) -> None:
    """Where two outputs part, the first engine held both tokens for as good as equally likely."""
    same = 0
    for left, right in zip(expected, found, strict=True):
        pairs = zip(left["token_ids"], right["token_ids"], strict=True)
        parted = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if parted is None:
            same += 1
            continue
        likely = {token: logprob for token, logprob, _ in left["logprobs"][parted]}
        gap = likely[left["token_ids"][parted]] - likely.get(right["token_ids"][parted], -99.0)
        assert gap <= TIE, (parted, gap)
    assert same > 0


@pytest.fixture(scope="module")
def asleep(model, run_series) -> dict:
    """One engine with CUDA graphs that sleeps between batches."""
    sleeps = [
        [],
        [["sleep", 1], ["wake_up"]],
        # vLLM's recipe for level 2: memory of the weights, the weights, then the cache.
        [
            ["sleep", 2],
            ["wake_up", ["weights"]],
            ["collective_rpc", "reload_weights"],
            ["wake_up", ["kv_cache"]],
        ],
        [],
    ]
    engine = {"model": model["model"], **ENGINE, "enable_sleep_mode": True}
    batches = [batch(calls=calls) for calls in sleeps]
    jobs = {"asleep": {"engine": engine | speculation(model["heads"]), "batches": batches}}
    result = run_series(jobs)["asleep"]
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize("sampled", [False, True])
def test_prompts_between_trees_take_graphs(model, run_job, sampled):
    """Requests come and go: forward pass and rest are graphs, and say what plain decoding says."""
    prompts = traffic.prompts(24, seed=4, high=64)
    params = traffic.sampling("greedy", 24, max_tokens=40)
    params = [one | {"max_tokens": 16 + i} for i, one in enumerate(params)]
    if sampled:
        # Nucleus sampling, drawn by vLLM's kernels before a graph; of one token it is greedy.
        params = [one | {"temperature": 1.0, "top_p": 1e-6} for one in params]
    engine = {"model": model["model"], **ENGINE, "max_num_batched_tokens": 128}
    named = [{"prompts": prompts, "sampling": [one | {"logprobs": 2} for one in params]}]
    plain = run_job(engine, named)
    found = run_job(
        engine | speculation(model["heads"]),
        [{"prompts": prompts, "sampling": params}],
        count_graphs_of_mixed_batches=True,
        compare_drawn_steps=True,
    )
    first_choices = [
        [row | {"token_ids": row["token_ids"][0]} for row in result["batches"][0]]
        for result in (plain, found)
    ]
    assert_alike(*first_choices)
    assert found["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert found["graphs_of_mixed_batches"] >= 8
    # Behind the draw batches of any mix have graphs; whole steps are laid out as equal trees.
    taken = len(found["drawn_steps"]) if sampled else found["laid_out_steps"]
    assert taken >= 4


# What vLLM's kernels draw before a graph does the rest.
DRAWN = [
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95, "logit_bias": {"7": 3.0}, "logprobs": 2},
    {"temperature": 0.6, "allowed_token_ids": list(range(3, 40))},
]


@pytest.mark.parametrize("kinds", [DRAWN[:1], DRAWN], ids=["top-p", "side by side"])
def test_graphs_behind_the_draw_equal_the_launches(model, run_job, kinds):
    """Tokens, counts and log probabilities of every step, from 41 rows of logits to 328."""
    requests = {
        "prompts": traffic.prompts(24, seed=4, high=64),
        "sampling": [
            {"max_tokens": 16 + 3 * i, "ignore_eos": True, "seed": i} | kinds[i % len(kinds)]
            for i in range(24)
        ],
    }
    engine = {"model": model["model"], **ENGINE, "max_num_batched_tokens": 128}
    medusa = engine | speculation(model["heads"])
    found = run_job(medusa, [requests], compare_drawn_steps=True)
    lengths = [len(request["token_ids"][0]) for request in found["batches"][0]]
    assert lengths == [one["max_tokens"] for one in requests["sampling"]]
    assert found["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    # Only batches whose graph was replayed are noted.
    steps = found["drawn_steps"]
    assert [step for step in steps if step["differ"]] == []
    assert sum(step["in place"] for step in steps) > 10
    assert any(0 < step["with drafts"] < step["requests"] for step in steps)


def test_sleep_keeps_target_and_heads(asleep):
    """Same tokens after each sleep, and as many drafts accepted: the heads are there again."""
    first, *others = asleep["batches"]
    for later in others:
        assert_alike(first, later)
    accepted = asleep["accepted"]
    assert accepted[0] > 0
    assert all(abs(count - accepted[0]) <= 0.1 * accepted[0] for count in accepted), accepted


def test_heads_in_float8_change_no_token(model, run_series):
    """With CUDA graphs: what plain decoding says, and about as many drafts accepted."""
    engine = {"model": model["model"], **ENGINE}
    medusa = speculation(model["heads"])["speculative_config"]
    jobs = {"plain": {"engine": engine, "batches": [batch()]}}
    for weights in ("unquantised", "float8"):
        config = {"speculative_config": medusa | {"draft_weights": weights}}
        jobs[weights] = {"engine": engine | config, "batches": [batch()]}
    results = run_series(jobs)
    for name, result in results.items():
        assert "error" not in result, (name, result["error"])
        assert_alike(results["plain"]["batches"][0], result["batches"][0])
    exact, rounded = (results[name]["accepted"][0] for name in ("unquantised", "float8"))
    assert exact > 0
    # Four bits of each weight, of heads that are right most of the time.
    assert abs(rounded - exact) <= 0.1 * exact


def test_drafts_that_know_the_noise(model, run_series):
    """In every graph: sampled requests have more drafts accepted, and end as they should."""
    engine = {"model": model["model"], **ENGINE}
    medusa = speculation(model["heads"])["speculative_config"]
    sampling = [
        {"max_tokens": 64, "ignore_eos": True, "seed": i, "temperature": 0.8}
        | ({"top_p": 0.95} if i >= 8 else {})
        for i in range(16)
    ]
    requests = {"prompts": traffic.prompts(16, seed=2, high=64), "sampling": sampling}
    jobs = {
        name: {
            "engine": engine | {"speculative_config": medusa | {"coupled_drafts": coupled}},
            "batches": [requests],
        }
        for name, coupled in (("alone", False), ("coupled", True))
    }
    results = run_series(jobs)
    for name, result in results.items():
        assert "error" not in result, (name, result["error"])
        assert [len(one["token_ids"]) for one in result["batches"][0]] == [64] * 16
    steps = {
        name: result["counters"]["vllm:spec_decode_num_drafts"] for name, result in results.items()
    }
    assert steps["coupled"] < 0.98 * steps["alone"]


def test_offloading(model, run_series):
    """Cache blocks that trees have written come back from the host's memory."""
    engine = {"model": model["model"], **ENGINE}
    first = run_series({"plain": {"engine": engine, "batches": [batch()]}})["plain"]
    outputs = [request["token_ids"] for request in first["batches"][0]]
    longer = [a + b for a, b in zip(batch()["prompts"], outputs, strict=True)]
    batches = [batch(), batch(longer)]
    medusa = engine | OFFLOADING | speculation(model["heads"])
    jobs = {name: {"engine": e, "batches": batches} for name, e in (("p", engine), ("m", medusa))}
    plain, found = run_series(jobs).values()
    assert "error" not in found, found["error"]
    for left, right in zip(plain["batches"], found["batches"], strict=True):
        assert_alike(left, right)
    assert found["counters"]["vllm:external_prefix_cache_hits"] > 0
    assert found["accepted"][1] > 0


QUANTISED = {
    "fp8, online": (None, {"quantization": "fp8"}),
    "fp8": (variants.write_fp8, {}),
    "gptq": (variants.write_gptq, {"dtype": "float16"}),
    "gptq lm_head": (variants.write_gptq, {"dtype": "float16"}),
    "awq": (variants.write_awq, {"dtype": "float16"}),
    "int4": (variants.write_int4, {}),
}


@pytest.fixture(scope="module")
def quantised(model, run_series, tmp_path_factory) -> dict[str, dict]:
    """Format -> result, plain and with Medusa; heads that know nothing share the lm_head."""
    root = tmp_path_factory.mktemp("quantised")
    jobs = {}
    for name, (write, extra) in QUANTISED.items():
        path, heads, options = model["model"], model["heads"], {}
        if name == "gptq lm_head":
            path, heads, options = model["wide"], model["random"], {"lm_head": True}
        if write is not None:
            write(Path(path), root / name, **options)
            path = str(root / name)
        engine = {"model": path, **ENGINE, "enforce_eager": True, **extra}
        jobs[name] = {"engine": engine, "batches": [batch()]}
        jobs[f"{name}, medusa"] = {"engine": engine | speculation(heads), "batches": [batch()]}
    return run_series(jobs)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(quantised, name):
    plain, medusa = quantised[name], quantised[f"{name}, medusa"]
    assert "error" not in plain, plain["error"]
    assert "error" not in medusa, medusa["error"]
    assert_alike(plain["batches"][0], medusa["batches"][0])
    if name != "gptq lm_head":
        assert medusa["accepted"][0] > 0
