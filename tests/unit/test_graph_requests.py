"""Which requests have their whole step in a graph, which all but the draw, and which none."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

SamplingParams = pytest.importorskip("vllm").SamplingParams
VOCAB_SIZE = 100


def sampler_of(params: SamplingParams, custom: bool = False) -> SimpleNamespace:
    """What vLLM's sampler knows of the only request, with or without a processor of the user's."""
    filters = {
        "top_k": params.top_k if params.top_k > 0 else VOCAB_SIZE,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }
    states = {name: SimpleNamespace(np=np.array([value])) for name, value in filters.items()}
    return SimpleNamespace(
        needs_logits_processing=np.array([params != SamplingParams(temperature=0.0)]),
        sampling_states=SimpleNamespace(vocab_size=VOCAB_SIZE, **states),
        logits_processors=[None] * (3 + custom),
    )


def route(custom: bool = False, **options) -> str:
    from vllm_medusa.graph_requests import needs_only_draw, needs_only_temperature
    from vllm_medusa.row_sampling import RowSampler
    from vllm_medusa.tree import TokenTree

    params = SamplingParams(**options)
    sampler = sampler_of(params, custom)
    rows = RowSampler(sampler, TokenTree.from_widths([1]), None)
    rows.add_request(0, params)
    simple = needs_only_temperature(sampler, 0, params)
    drawable = needs_only_draw(rows, 0, params)
    # Every request whose whole step is a graph's can stand in a batch that is drawn before one.
    assert drawable or not simple
    return "whole" if simple else "behind the draw" if drawable else "launches"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.0}, "whole"),
        ({"temperature": 0.7, "seed": 1}, "whole"),
        ({"temperature": 0.7, "stop": ["x"], "max_tokens": 9}, "whole"),
        ({"top_p": 0.9}, "behind the draw"),
        ({"top_k": 20}, "behind the draw"),
        ({"min_p": 0.1}, "behind the draw"),
        ({"temperature": 0.0, "logit_bias": {7: 1.0}}, "behind the draw"),
        ({"temperature": 0.0, "allowed_token_ids": [1, 2]}, "behind the draw"),
        ({"temperature": 0.0, "min_tokens": 4}, "behind the draw"),
        ({"temperature": 0.0, "logprobs": 0}, "behind the draw"),
        ({"temperature": 0.0, "logprob_token_ids": [5]}, "behind the draw"),
        ({"prompt_logprobs": 0}, "launches"),
        ({"prompt_logprob_token_ids": [[5]]}, "launches"),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, "launches"),
        ({"frequency_penalty": 0.1}, "launches"),
        ({"custom": True, "temperature": 0.7}, "launches"),
        ({"custom": True, "temperature": 0.0}, "whole"),
    ],
    ids=str,
)
def test_route_of_a_request(options, expected):
    assert route(**options) == expected


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 65, 256, 512])
def test_sizes_of_graphs_rise_to_the_largest_batch(most):
    from vllm_medusa.drawn_step import request_counts

    sizes = list(request_counts(most))
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    # The heads run for the padding, too.
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))
