"""Which requests CUDA graphs serve after the forward pass."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import SamplingParams

from vllm_medusa.request_options import reads_history
from vllm_medusa.row_sampling import NUM_STOCK_PROCESSORS, RowSampler


def _names_any(params: SamplingParams, *options: str) -> bool:
    return any(getattr(params, option, None) is not None for option in options)


def _returns_prompt_logprobs(params: SamplingParams) -> bool:
    # vLLM reads them from the prompt's hidden states and counters after the draw.
    return _names_any(params, "prompt_logprobs", "prompt_logprob_token_ids")


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
    if _returns_prompt_logprobs(params) or _names_any(params, "logprobs", "logprob_token_ids"):
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
    """Whether only the draw of a row's token tells a request's step from a greedy one's.

    That, and the log probabilities of the rows that became output.

    Parameters
    ----------
    row_sampler : RowSampler
        Knows the request already.
    index : int
        Request slot.
    params : vllm.SamplingParams
    """
    return not _returns_prompt_logprobs(params) and not row_sampler.reads_history[index]
