"""Which requests CUDA graphs serve after the forward pass."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams

from vllm_medusa.request_options import reads_history
from vllm_medusa.row_sampling import NUM_STOCK_PROCESSORS, RowSampler


def returns_logprobs(params: SamplingParams) -> bool:
    """Whether a request wants log probabilities of any kind."""
    names = ("logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids")
    return any(getattr(params, name, None) is not None for name in names)


def needs_only_temperature(sampler: Any, index: int, params: SamplingParams) -> bool:
    """Whether the sampling kernel alone turns a request's logits into its token.

    Parameters
    ----------
    sampler : vllm.v1.worker.gpu.sample.sampler.Sampler
        Knows the request already.
    index : int
        Request slot.
    params : vllm.SamplingParams
    """
    if returns_logprobs(params):
        return False
    if not sampler.needs_logits_processing[index]:
        return True
    states = sampler.sampling_states
    return (
        len(sampler.logits_processors) == NUM_STOCK_PROCESSORS
        and states.top_k.np[index] == states.vocab_size
        and states.top_p.np[index] == 1.0
        and states.min_p.np[index] == 0.0
        and not params.logit_bias
        and not params.allowed_token_ids
        and params.min_tokens == 0
        and not reads_history(params)
    )


def needs_only_draw(row_sampler: RowSampler, index: int, params: SamplingParams) -> bool:
    """Whether nothing but tokens drawn row by row tells a request's step from a greedy one's.

    Parameters
    ----------
    row_sampler : RowSampler
        Knows the request already.
    index : int
        Request slot.
    params : vllm.SamplingParams
    """
    return not returns_logprobs(params) and not row_sampler.reads_history[index]
