"""What a token tree cannot be combined with yet, checked once at start-up."""

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


def _v2_runner_off(config: Any) -> bool:
    return not config.use_v2_model_runner


def _is_encoder_decoder(config: Any) -> bool:
    return config.model_config.is_encoder_decoder


def _recurrent(config: Any) -> bool:
    model = config.model_config
    return model.is_hybrid or model.is_attention_free


def _kv_cache_dtype(config: Any) -> bool:
    return config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32")


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "the V1 model runner",
        "trees run on Model Runner V2 only; unset VLLM_USE_V2_MODEL_RUNNER and check that Triton "
        "is installed",
        _v2_runner_off,
    ),
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
        "decode or prefill context parallelism",
        "accepted rows would have to move between ranks",
        lambda c: c.parallel_config.decode_context_parallel_size > 1
        or c.parallel_config.prefill_context_parallel_size > 1,
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
        "a quantised KV cache",
        "tree attention over it is not tested yet; use kv_cache_dtype=auto",
        _kv_cache_dtype,
    ),
    Refusal(
        "pipeline parallelism without async scheduling",
        "vLLM's V2 runner asserts on it with drafts; drop --no-async-scheduling",
        lambda c: c.parallel_config.pipeline_parallel_size > 1
        and not c.scheduler_config.async_scheduling,
    ),
    Refusal(
        "custom logits processors",
        "they may read draft rows as a chain",
        lambda c: bool(c.model_config.logits_processors),
    ),
    Refusal(
        "return_sampling_mask",
        "its rows are laid out as a chain",
        lambda c: c.model_config.return_sampling_mask,
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
