"""What a token tree runs with, and what it cannot be combined with yet.

The second part is checked once at start-up; README's table is made of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """A vLLM feature that Medusa refuses.

    Attributes
    ----------
    feature : str
        As a user names it.
    reason : str
        Why, in words that end the sentence "Medusa does not run with <feature>: <reason>".
    applies : callable
        VllmConfig -> whether the feature is on.
    """

    feature: str
    reason: str
    applies: Callable[[Any], bool]


@dataclass(frozen=True)
class Supported:
    """A vLLM feature or a kind of model whose output was compared with plain vLLM's.

    Attributes
    ----------
    feature : str
        As a user names it.
    status : str
        ``works``, or what is different about it.
    test : str
        The test that shows it: ``file::function`` or ``file::function[parameter]``.
    """

    feature: str
    status: str
    test: str


WORKS = "works"

_FAMILIES = "tests/integration/test_families.py::test_family_identity"
_FEATURES = "tests/integration/test_features.py::test_feature_identity"
_IDENTITY = "tests/integration/test_identity.py"
_PARALLEL = "tests/integration/test_parallel.py::test_two_workers_return_what_one_returns"
_REPLICAS = "tests/integration/test_parallel.py::test_two_replicas_return_what_one_returns"
_GRAMMAR = "tests/integration/test_requests.py::test_grammar_follows_the_path"
_GPU = "tests/integration/test_gpu_features.py"
_HTTP = "tests/integration/test_http.py"
_OPTIONS = "tests/integration/test_requests.py::test_options_of_a_request"
_REQUESTS = "tests/integration/test_requests.py::test_history_is_the_path"

SUPPORTED: tuple[Supported, ...] = (
    Supported("greedy decoding", WORKS, f"{_IDENTITY}::test_greedy_equals_stock_v1_runner"),
    Supported(
        "seeded sampling, top-k, top-p, min-p, stop tokens",
        WORKS,
        f"{_IDENTITY}::test_seeded_sampling_equals_stock_v2_runner",
    ),
    Supported(
        "chunked prefill, prefix caching, preemption",
        WORKS,
        f"{_IDENTITY}::test_greedy_equals_stock_v1_runner",
    ),
    Supported(
        "prefill and decode in one batch",
        WORKS,
        f"{_IDENTITY}::test_greedy_equals_stock_v1_runner",
    ),
    Supported(
        "batches and trees smaller than a CUDA graph's size",
        WORKS,
        f"{_IDENTITY}::test_step_of_the_verification_graphs_equals_stock",
    ),
    Supported(
        "CUDA graphs behind top-k, top-p, min-p, logit bias and logprobs",
        WORKS,
        "tests/integration/test_drawn_steps.py::test_mixed_batches_equal_plain_vllm_and_the_launches",
    ),
    Supported(
        "a request that reaches max_model_len inside a tree",
        WORKS,
        f"{_IDENTITY}::test_output_up_to_the_model_length",
    ),
    Supported(
        "logit bias, allowed tokens, min tokens",
        WORKS,
        f"{_IDENTITY}::test_bias_penalties_and_stops_side_by_side",
    ),
    Supported("several outputs of a request (n > 1)", WORKS, f"{_OPTIONS}[n > 1]"),
    Supported(
        "stop strings and tokens, min tokens, ignore_eos",
        WORKS,
        f"{_OPTIONS}[stop strings and tokens]",
    ),
    Supported(
        "logit bias with allowed tokens, min-p and seeds",
        WORKS,
        f"{_OPTIONS}[logit bias and allowed tokens]",
    ),
    Supported("max_tokens inside a path", WORKS, f"{_OPTIONS}[max_tokens at every cut]"),
    Supported("repetition, presence and frequency penalties", WORKS, f"{_REQUESTS}[penalties]"),
    Supported("bad words", WORKS, f"{_REQUESTS}[bad words]"),
    Supported("thinking budgets", WORKS, f"{_REQUESTS}[thinking budget]"),
    Supported(
        "custom logits processors (vLLM's V2 interface)",
        WORKS,
        "tests/integration/test_requests.py::test_custom_logits_processors_see_chains[alone]",
    ),
    Supported(
        "structured outputs (JSON schema, regex, choice, grammar): xgrammar",
        WORKS,
        f"{_GRAMMAR}[xgrammar]",
    ),
    Supported(
        "structured outputs (JSON schema, regex, choice, grammar): guidance",
        WORKS,
        f"{_GRAMMAR}[guidance]",
    ),
    Supported(
        "per_request_spec_decode_metrics (by depth, not by node)",
        WORKS,
        "tests/integration/test_requests.py::test_metrics_of_a_request_count_depth",
    ),
    Supported(
        "statistics in a response (metrics.speculative_decoding)",
        WORKS,
        f"{_HTTP}::test_statistics_of_a_response",
    ),
    Supported(
        "tool calls over HTTP: named, required",
        WORKS,
        f"{_HTTP}::test_tool_call_follows_its_grammar[named]",
    ),
    Supported(
        "tool calls over HTTP: auto, with a parser",
        WORKS,
        f"{_HTTP}::test_a_parser_finds_the_call_in_text",
    ),
    Supported(
        "typical acceptance, of the server or of a request",
        "works; lossless only for greedy requests",
        "tests/integration/test_requests.py::test_typical_acceptance_beside_exact",
    ),
    Supported(
        "a request's own rule, node budget or no speculation (extra_args, vllm_xargs)",
        WORKS,
        "tests/integration/test_requests.py::test_a_request_s_own_options[budgets]",
    ),
    Supported(
        "a tree per request and per step (tree: dynamic)",
        "works; requests with structured outputs, penalties, bad words, thinking budgets or custom "
        "processors keep the start-up tree",
        "tests/integration/test_requests.py::test_chosen_trees_beside_the_start_up_tree[free]",
    ),
    Supported(
        "prompt lookup in such trees (prompt_lookup)",
        WORKS,
        f"{_IDENTITY}::test_greedy_equals_stock_v1_runner[chosen trees, preempted and chunked]",
    ),
    Supported("logprobs", WORKS, f"{_IDENTITY}::test_logprobs_are_those_of_the_accepted_rows"),
    Supported(
        "logprobs of named tokens (logprob_token_ids)",
        WORKS,
        "tests/integration/test_requests.py::test_logprobs_of_named_tokens",
    ),
    Supported("prompt logprobs", WORKS, f"{_FEATURES}[prompt logprobs]"),
    Supported("requests aborted in mid-stream", WORKS, f"{_FEATURES}[abort]"),
    Supported("prompts as embeddings", WORKS, f"{_FEATURES}[embeddings]"),
    Supported("W8A8 int8 weights (compressed-tensors)", WORKS, f"{_FEATURES}[int8]"),
    Supported("tensor parallelism", WORKS, f"{_PARALLEL}[tensor]"),
    Supported("pipeline parallelism (independent heads)", WORKS, f"{_PARALLEL}[pipeline]"),
    Supported("data parallelism", WORKS, _REPLICAS),
    Supported(
        "data and expert parallelism (Mixtral)",
        "works in tests that supply what vLLM lacks for it on a CPU; not run on a GPU",
        "tests/integration/test_parallel.py::"
        "test_experts_of_two_replicas_return_what_one_worker_returns",
    ),
    Supported(
        "replicas on Ray (data_parallel_backend=ray)",
        WORKS,
        "tests/integration/test_ray.py::test_replicas_on_ray_return_what_one_worker_returns",
    ),
    Supported(
        "workers on Ray",
        WORKS,
        "tests/integration/test_ray.py::test_ray_workers_return_what_one_worker_returns",
    ),
    Supported("W4A16 weights (compressed-tensors)", WORKS, f"{_FEATURES}[int4]"),
    Supported("AWQ weights", WORKS, f"{_FEATURES}[awq]"),
    Supported("GPTQ weights", WORKS, f"{_FEATURES}[gptq]"),
    Supported("GPTQ lm_head that the heads share", WORKS, f"{_FEATURES}[gptq lm_head]"),
    Supported(
        "FP8 weights, from a checkpoint or online (GPU)",
        WORKS,
        f"{_GPU}::test_quantised_weights[fp8, online]",
    ),
    Supported(
        "bitsandbytes weights",
        "not in vLLM 0.32, which refuses the name",
        "tests/integration/test_features.py::test_refused_at_start[bitsandbytes]",
    ),
    Supported("KV offloading (OffloadingConnector)", WORKS, f"{_FEATURES}[offloading]"),
    Supported("reload_weights", WORKS, f"{_FEATURES}[reload]"),
    Supported(
        "sleep mode on a CPU",
        "vLLM refuses it there",
        "tests/integration/test_features.py::test_refused_at_start[sleep mode]",
    ),
    Supported(
        "sleep mode, levels 1 and 2 (GPU)", WORKS, f"{_GPU}::test_sleep_keeps_target_and_heads"
    ),
    Supported("LoRA adapters on the base (independent heads)", WORKS, f"{_FEATURES}[lora]"),
    Supported(
        "another engine before or after it in one process",
        WORKS,
        "tests/integration/test_features.py::test_engines_one_after_another",
    ),
    Supported(
        "fp8 (e4m3) KV cache on a GPU",
        "works; answers are compared by benchmarks/check_float8_cache.py",
        "tests/kernels/test_tree_attention.py::test_float8_queries",
    ),
    Supported("Llama, SmolLM3", WORKS, f"{_FAMILIES}[smollm3]"),
    Supported("Mistral, sliding window", WORKS, f"{_FAMILIES}[mistral]"),
    Supported("Qwen2, Qwen3", WORKS, f"{_FAMILIES}[qwen3]"),
    Supported("Gemma, Gemma 2, Gemma 3 (text): windows, soft caps", WORKS, f"{_FAMILIES}[gemma2]"),
    Supported("Phi-3", WORKS, f"{_FAMILIES}[phi3]"),
    Supported("Mixtral, Qwen2-MoE, Qwen3-MoE", WORKS, f"{_FAMILIES}[mixtral]"),
    Supported("GPT-OSS: attention sinks, windows", WORKS, f"{_FAMILIES}[gpt_oss]"),
    Supported("GPT-2, OPT: learned positions", WORKS, f"{_FAMILIES}[gpt2]"),
    Supported("GPT-NeoX, OLMo 2, Granite, Cohere, StableLM", WORKS, f"{_FAMILIES}[gpt_neox]"),
    Supported("M-RoPE positions (Qwen2-VL and others)", WORKS, f"{_FAMILIES}[mrope]"),
)

# vLLM's KV offloading copies a block in a step after the one that filled it: full blocks of
# tokens that were output, whose rows have moved to their places by then.
OFFLOADING_CONNECTOR = "OffloadingConnector"

# Where every refusal is provoked.
REFUSAL_TEST = "tests/unit/test_compatibility.py::test_refusal"


def _v2_runner_off(config: Any) -> bool:
    return not config.use_v2_model_runner


def _is_encoder_decoder(config: Any) -> bool:
    return config.model_config.is_encoder_decoder


def _recurrent(config: Any) -> bool:
    model = config.model_config
    return model.is_hybrid or model.is_attention_free


def _kv_cache_dtype(config: Any) -> bool:
    dtype = config.cache_config.cache_dtype
    if dtype in ("fp8", "fp8_e4m3"):
        from vllm.platforms import current_platform

        return not current_platform.is_cuda()
    return dtype not in ("auto", "bfloat16", "float16", "float32")


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "recurrent layers (Mamba, gated delta nets)",
        "their state cannot branch",
        _recurrent,
    ),
    Refusal(
        "multi-head latent attention (MLA)",
        "tree attention has no latent-cache kernel yet",
        lambda c: c.model_config.use_mla,
    ),
    Refusal(
        "encoder-decoder models",
        "cross-attention rows are not verified as a tree",
        _is_encoder_decoder,
    ),
    Refusal(
        "pooling models",
        "they draft no tokens",
        lambda c: c.model_config.runner_type == "pooling",
    ),
    Refusal(
        "prefix-LM masks",
        "the bidirectional mask and the tree mask conflict",
        lambda c: c.model_config.is_mm_prefix_lm,
    ),
    Refusal(
        "chunked local attention (Llama 4)",
        "its chunks are cut along the batch row, where a tree has branches",
        lambda c: bool(getattr(c.model_config.hf_text_config, "attention_chunk_size", None)),
    ),
    Refusal(
        "reference sliding windows",
        "their reference rows are counted along the batch row, where a tree has branches",
        lambda c: c.model_config.rswa_window is not None,
    ),
    Refusal(
        "KV connectors other than OffloadingConnector",
        "some copy cache rows inside the forward pass, before accepted ones have moved to their "
        "places, and the others are not tested",
        lambda c: (
            c.kv_transfer_config is not None
            and c.kv_transfer_config.kv_connector != OFFLOADING_CONNECTOR
        ),
    ),
    Refusal(
        "KV offloading with pipeline parallelism",
        "the stages move accepted rows at different times, and offloading then is not tested",
        lambda c: (
            c.kv_transfer_config is not None and c.parallel_config.pipeline_parallel_size > 1
        ),
    ),
    Refusal(
        "decode context parallelism",
        "accepted rows would have to move between ranks",
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
    ),
    Refusal(
        "prefill context parallelism",
        "its ranks share out the rows of a batch, and trees in such a batch are not tested",
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
    ),
    Refusal(
        "dual batch overlap",
        "vLLM's V2 runner does not combine it with speculation",
        lambda c: c.parallel_config.use_ubatching,
    ),
    Refusal(
        "batch-sharded sampling",
        "paths of requests that another rank samples arrive too late",
        lambda c: c.parallel_config.enable_batch_sharded_sampling,
    ),
    Refusal(
        "KV-sharing fast prefill",
        "its reduced batch knows no tree rows",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
    ),
    Refusal(
        "a quantised KV cache other than fp8_e4m3 on a GPU",
        "nothing else is read by tree attention and FlashAttention alike; use kv_cache_dtype=auto",
        _kv_cache_dtype,
    ),
    Refusal(
        "pipeline parallelism without async scheduling",
        "vLLM's V2 runner asserts on it with drafts; drop --no-async-scheduling",
        lambda c: (
            c.parallel_config.pipeline_parallel_size > 1 and not c.scheduler_config.async_scheduling
        ),
    ),
    Refusal(
        "return_sampling_mask",
        "its rows are laid out as a chain",
        lambda c: c.model_config.return_sampling_mask,
    ),
    # Last: vLLM falls back to that runner for the sake of some of the features above.
    Refusal(
        "the V1 model runner",
        "trees run on Model Runner V2 only; unset VLLM_USE_V2_MODEL_RUNNER and check that Triton "
        "is installed",
        _v2_runner_off,
    ),
)


def check_config(vllm_config: Any) -> None:
    """Refuse unsupported combinations at start.

    Raises
    ------
    ValueError
        Naming the feature and the reason.
    """
    for refusal in REFUSALS:
        if refusal.applies(vllm_config):
            raise ValueError(f"Medusa does not run with {refusal.feature}: {refusal.reason}")
