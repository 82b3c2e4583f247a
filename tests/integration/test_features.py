"""Features of vLLM beside a token tree: the output of plain vLLM, or a refusal at start.

Each case is two engines, with Medusa and without, in one series of engines.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
import variants
from families import random_heads
from test_families import ENGINE, NODES, batches, token_ids
from tiny import HIDDEN, VOCAB, make_model

pytestmark = pytest.mark.vllm

ABORTED, ABORTED_AFTER = [1, 4, 9], 11
QUANTISED = ("int8", "int4", "gptq", "awq", "gptq lm_head")
CASES = (
    *("plain", "prompt logprobs", "abort", "embeddings", "lora", "reload"),
    *("offloading", "offloading, async"),
    *QUANTISED,
)
# Blocks for a third of the requests' tokens: others are preempted, and finished ones dropped.
FEW_BLOCKS = 30
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "cpu_bytes_to_use": 2**26,
        "offload_prompt_only": False,
        "spec_name": "HostOffloadingSpec",
        "spec_module_path": "host_offloading",
    },
}
# float32 log-softmax of one vocabulary, summed in another order.
LOGPROB_TOLERANCE = 2e-4


def quantised_jobs(tiny: dict[str, str], root: Path) -> dict[str, dict]:
    """Format -> the job without Medusa; vLLM's products of four-bit weights take no float32."""
    source = Path(tiny["model"])
    variants.write_int8(source, root / "int8")
    variants.write_int4(source, root / "int4")
    variants.write_gptq(source, root / "gptq")
    variants.write_awq(source, root / "awq")
    # vLLM reads a quantised lm_head where it need not pad the vocabulary, and the heads share it.
    make_model(root / "wide", vocab_size=128)
    variants.write_gptq(root / "wide", root / "gptq lm_head", lm_head=True)
    random_heads(root / "shared lm_head")
    jobs = {}
    for name in QUANTISED:
        dtype = "float32" if name == "int8" else "float16"
        engine = {"model": str(root / name), **ENGINE, "dtype": dtype}
        jobs[name] = {"engine": engine, "batches": batches()}
    jobs["gptq lm_head"]["heads"] = str(root / "shared lm_head")
    return jobs


# What vLLM's int4 product gives a row depends on the rows beside it. At one token of these 32
# answers two logits are tied but for that: chains and chosen trees part from plain decoding at
# the same place, this tree does not.
TIED = ("int4", "gptq")


def feature_jobs(tiny: dict[str, str], root: Path) -> dict[str, dict]:
    """Case -> the job without Medusa; "medusa" and "heads" are for the other engine."""
    variants.write_embeddings(Path(tiny["model"]), root / "table.pt")
    # vLLM's CPU kernels give a request without an adapter the last one's weights.
    adapters = [str(root / "adapter 1"), str(root / "adapter 2")]
    for seed, adapter in enumerate(adapters):
        variants.write_adapter(Path(tiny["model"]), Path(adapter), seed)
    engine = {"model": tiny["model"], **ENGINE}
    # vLLM wants room for a whole tree of every request.
    with_lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with_lora["max_num_batched_tokens"] = ENGINE["max_num_seqs"] * (NODES + 1)
    adapted = [batch | {"adapters": adapters} for batch in batches()]
    with_logprobs = batches()
    for batch in with_logprobs:
        batch["sampling"] = [params | {"prompt_logprobs": 2} for params in batch["sampling"]]
    aborting = [b | {"abort": ABORTED, "abort_after": ABORTED_AFTER} for b in batches()]
    embedded = [batch | {"embeddings": str(root / "table.pt")} for batch in batches()]
    continued = [b | extra for b in batches() for extra in ({}, {"continues": True})]
    reloaded = [b | {"calls": [["collective_rpc", "reload_weights"]]} for b in batches()]
    offloading = {
        "engine": engine | {"num_gpu_blocks_override": FEW_BLOCKS},
        "batches": continued,
        "medusa": {"kv_transfer_config": OFFLOADING},
    }
    return {
        "plain": {"engine": engine, "batches": batches()},
        "prompt logprobs": {"engine": engine, "batches": with_logprobs},
        # The next batch runs in the slots that the aborted requests left.
        "abort": {"engine": engine, "batches": [*aborting, *batches()]},
        "embeddings": {"engine": engine | {"enable_prompt_embeds": True}, "batches": embedded},
        "lora": {"engine": engine | with_lora, "batches": adapted},
        "offloading": offloading,
        # As on a GPU: the next step is scheduled before this one's tokens are known.
        "offloading, async": offloading | {"async": True},
        "reload": {"engine": engine, "batches": reloaded},
        **quantised_jobs(tiny, root),
    }


@pytest.fixture(scope="module")
def results(tiny, run_series, tmp_path_factory) -> dict[str, dict]:
    """``case`` and ``case, medusa`` -> result; V1 and V2 engines around them."""
    jobs = feature_jobs(tiny, tmp_path_factory.mktemp("features"))
    config = {"method": "medusa", "num_speculative_tokens": NODES}
    series = {"V1 before": jobs["plain"]}
    for name, job in jobs.items():
        own = {"model": job.get("heads", tiny["heads"])}
        if name in TIED:
            own["tree"] = "static"
        speculation = {"speculative_config": config | own}
        engine = job["engine"] | job.get("medusa", {}) | speculation
        series[f"{name}, medusa"] = {**job, "engine": engine, "watch_pool": name == "plain"}
    series["V1 after"] = jobs["plain"]
    series |= {name: {**job, "plain_v2": True} for name, job in jobs.items()}
    return run_series(series)


def skip_without_int4_product(results: dict[str, dict], case: str) -> None:
    """Stock vLLM has no int4 product on CPUs without AVX-512, and so no such model either."""
    if "cpu_gemm_wna16" in results[case].get("error", ""):
        pytest.skip("this CPU has no AVX-512, which vLLM's int4 product needs")


@pytest.mark.parametrize("case", CASES)
def test_feature_identity(results, case):
    skip_without_int4_product(results, case)
    expected, found = token_ids(results[case]), token_ids(results[f"{case}, medusa"])
    if case == "abort":
        for batches in (expected, found):
            for batch in batches[:2]:
                for index in ABORTED:
                    # A tree may return several tokens in the step that reached the limit.
                    assert ABORTED_AFTER <= len(batch[index]) < 48
                    del batch[index][ABORTED_AFTER:]
    assert found == expected
    counters = results[f"{case}, medusa"]["counters"]
    # Random heads are right now and then.
    assert counters["vllm:spec_decode_num_accepted_tokens"] > 0
    assert results[f"{case}, medusa"]["runner"] == "MedusaCPUModelRunner"
    assert results[case]["runner"] == "CPUModelRunner"


def test_prompt_logprobs_are_the_prompt_s(results):
    pairs = zip(
        *(results[name]["batches"] for name in ("prompt logprobs", "prompt logprobs, medusa")),
        strict=True,
    )
    for left, right in ((a, b) for p, q in pairs for a, b in zip(p, q, strict=True)):
        assert left["prompt_logprobs"][0] is right["prompt_logprobs"][0] is None
        for plain, ours in zip(
            left["prompt_logprobs"][1:], right["prompt_logprobs"][1:], strict=True
        ):
            assert [(t, rank) for t, _, rank in plain] == [(t, rank) for t, _, rank in ours]
            for (_, x, _), (_, y, _) in zip(plain, ours, strict=True):
                assert abs(x - y) < LOGPROB_TOLERANCE


def test_embeddings_of_tokens_are_the_tokens(results):
    assert token_ids(results["embeddings, medusa"]) == token_ids(results["plain"])


def test_what_level_2_sleep_drops_is_what_vllm_brings_back(results):
    """Of what the plugin keeps, only the heads lie with the weights."""
    pool = results["plain, medusa"]["pool"]
    assert pool["heads"] == ["bias", "lm_head", "weight"]
    assert pool["others"] == []


@pytest.mark.parametrize("case", ["offloading", "offloading, async"])
def test_offloaded_blocks_come_back(results, case):
    """More than the prompts of the first batches: blocks whose rows trees have written."""
    result = results[f"{case}, medusa"]
    prompt_tokens = sum(len(prompt) for batch in batches() for prompt in batch["prompts"])
    assert result["counters"]["vllm:external_prefix_cache_hits"] > prompt_tokens
    assert result["counters"]["vllm:num_preemptions"] > 0


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_is_another_model(results, case):
    skip_without_int4_product(results, case)
    assert token_ids(results[case]) != token_ids(results["plain"])


def test_adapters_are_other_models(results):
    plain, adapted = token_ids(results["plain"]), token_ids(results["lora, medusa"])
    for before, after in zip(plain, adapted, strict=True):
        assert before[0::2] != after[0::2] and before[1::2] != after[1::2]


def test_engines_one_after_another(results):
    """vLLM remembers attention backends for a whole process; each engine gets its own."""
    before, after = token_ids(results["V1 before"]), token_ids(results["V1 after"])
    assert before == after
    # The runners draw different noise from one seed: only the greedy batch is comparable.
    assert token_ids(results["plain, medusa"])[0] == before[0]


def model_configs(root: Path) -> dict[str, str]:
    """config.json, without weights, of models that a tree does not serve."""
    common = {"vocab_size": VOCAB, "hidden_size": HIDDEN}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "v_head_dim": 16}
    configs = {
        "MambaForCausalLM": transformers.MambaConfig(**common, num_hidden_layers=2, state_size=8),
        "Qwen3NextForCausalLM": transformers.Qwen3NextConfig(
            **common, **attention | {"num_hidden_layers": 4}
        ),
        "DeepseekV2ForCausalLM": transformers.DeepseekV2Config(
            **common, **attention | {"num_key_value_heads": 2}, **latent, qk_rope_head_dim=16
        ),
        "Llama4ForCausalLM": transformers.Llama4TextConfig(**common, **attention, head_dim=32),
        "BloomForCausalLM": transformers.BloomConfig(**common, n_layer=2, n_head=2),
    }
    paths = {}
    for name, config in configs.items():
        config.architectures = [name]
        config.save_pretrained(root / name)
        paths[name] = str(root / name)
    return paths


REFUSED = {
    "V1 runner": ({"env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}, "the V1 model runner"),
    "Mamba": ("MambaForCausalLM", "recurrent layers"),
    "gated delta net": ("Qwen3NextForCausalLM", "recurrent layers"),
    "MLA": ("DeepseekV2ForCausalLM", "multi-head latent attention"),
    "chunked attention": ("Llama4ForCausalLM", "chunked local attention"),
    "ALiBi": ("BloomForCausalLM", "ALiBi"),
    "pooling": ({"runner": "pooling"}, "pooling models"),
    "prefill context parallelism": (
        {"prefill_context_parallel_size": 2},
        "prefill context parallelism",
    ),
    "decode context parallelism": (
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
        "decode context parallelism",
    ),
    "dual batch overlap": ({"ubatch_size": 2}, "dual batch overlap"),
    "fast prefill": ({"kv_sharing_fast_prefill": True}, "KV-sharing fast prefill"),
    "FP8 cache": ({"kv_cache_dtype": "fp8"}, "a quantised KV cache"),
    "pipeline": ({"pipeline_parallel_size": 2}, "pipeline parallelism without async"),
    "KV connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "KV connectors other than",
    ),
    "offloading and pipeline": (
        {"kv_offloading_size": 1.0, "pipeline_parallel_size": 2},
        "KV offloading with pipeline",
    ),
    "batch-sharded sampling": (
        {"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2},
        "with batch-sharded sampling",
    ),
    "sampling mask": (
        {"return_sampling_mask": True, "logprobs_mode": "processed_logprobs"},
        "return_sampling_mask",
    ),
    "bitsandbytes": ({"quantization": "bitsandbytes"}, "bitsandbytes"),
    # vLLM's own refusal on a CPU.
    "sleep mode": ({"enable_sleep_mode": True}, "Sleep mode is not supported on current platform"),
}


@pytest.fixture(scope="module")
def refusals(tiny, run_series, tmp_path_factory) -> dict[str, dict]:
    paths = model_configs(tmp_path_factory.mktemp("configs"))
    config = {"method": "medusa", "model": tiny["heads"], "num_speculative_tokens": 8}
    engine = {"model": tiny["model"], **ENGINE, "speculative_config": config}
    jobs = {}
    for name, (change, _) in REFUSED.items():
        extra = {"model": paths[change]} if isinstance(change, str) else dict(change)
        env = extra.pop("env", {})
        # Positions are only seen to be ALiBi's when the layers are built.
        whole = name == "ALiBi"
        if whole:
            extra["load_format"] = "dummy"
        jobs[name] = {"engine": engine | extra, "env": env, "config_only": not whole}
        jobs[name]["batches"] = []
    return run_series(jobs)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_start(refusals, name):
    error = refusals[name].get("error", "not refused")
    assert REFUSED[name][1] in error, error
