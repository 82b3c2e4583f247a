"""Heads that score part of the vocabulary: their rows of the target's lm_head, cut out once.

A shared lm_head costs its full product for every head. Byte-pair vocabularies are numbered
in the order in which merges were learned, most frequent first, so the first quarter of the
ids holds nearly all that heads ever draft: 92 % of SmolLM2's answers, and 0.6 % to 1.5 %
fewer tokens per step for the shipped heads. Ids beyond are still emitted, never drafted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vllm_medusa.config import MAX_TREE_NODES
from vllm_medusa.head_weights import HeadWeights

DEFAULT_SHARE = 4
# Smaller parts are not worth a token, and a tree may ask for as many ranks. On two Zen 3 cores
# the product takes 2.9 of 38 ms of a step of SmolLM2-135M; on an H100 that of four heads with
# 128k ids of 4096 columns 371 us of 7.6 ms, and sequential heads read them once a level.
LEAST_SIZE = {"cpu": 4096, "cuda": 16384}
# On a GPU sequential heads behind the first score half as many. They are asked where the heads
# before were right, so they can miss less: with two thirds of SmolLM2's ids for all four heads 63
# nodes hold 0.3 % fewer tokens per step, with two thirds for the first and one third for the others
# 0.7 %, with one third for all 2.4 %. At 4096 columns every 16,384 rows take some 45 us a level,
# 0.5 % of an 8B model's step.
LATER_SHARE = 2
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def default_size(device_type: str, vocab_size: int) -> int | None:
    """Ids that heads with a shared lm_head score on a device; None: all."""
    size, least = vocab_size // DEFAULT_SHARE, LEAST_SIZE.get(device_type)
    return size if least is not None and size >= least else None


def later_size(device_type: str, size: int | None) -> int | None:
    """Ids that sequential heads behind the first score where the first scores ``size``; None: all.

    Examples
    --------
    >>> [later_size("cuda", size) for size in (32064, 200)], later_size("cpu", 12288)
    ([16032, 127], None)
    """
    if size is None or device_type != "cuda":
        return None
    # A tree may ask for as many ranks as it has nodes.
    return min(size, max(size // LATER_SHARE, MAX_TREE_NODES))


def cut_lm_head(weights: HeadWeights, target: Any, size: int | None) -> HeadWeights:
    """Give heads that score a subset their own rows of the target's lm_head.

    Parameters
    ----------
    weights : HeadWeights
        Returned as they are with lm_heads of their own, or with a map for each head.
    target : torch.nn.Module
        The loaded model; where its lm_head is sharded, quantised or has a bias nothing is cut.
    size : int or None
        Score the first ``size`` ids if the checkpoint names no subset.
    """
    spec = weights.spec
    lm_head = _whole_lm_head(target, spec.vocab_size, spec.hidden_size)
    ids = drafted_ids(weights, size)
    if ids is None or lm_head is None:
        return weights
    return dataclasses.replace(
        weights,
        spec=dataclasses.replace(
            spec, own_lm_head=True, common_lm_head=True, vocab_subset_size=len(ids)
        ),
        lm_head=lm_head[ids.to(lm_head.device)].to(spec.dtype)[None],
        token_map=ids[None],
    )


def drafted_ids(weights: HeadWeights, size: int | None) -> torch.Tensor | None:
    """Ids [n] that heads with a shared lm_head score; None: all, or each head its own."""
    spec = weights.spec
    if spec.own_lm_head or spec.vocab_subset_per_head:
        return None
    if weights.token_map is not None:
        return weights.token_map[0]
    return torch.arange(size) if size is not None and size < spec.vocab_size else None


def floating_lm_head(target: Any, hidden_size: int) -> Any | None:
    """The target's lm_head layer, if its rows are plain floats and it has no bias."""
    lm_head = getattr(target, "lm_head", None)
    weight = getattr(lm_head, "weight", None)
    # Floats of eight bits are quantised weights too.
    if weight is None or weight.dtype not in FLOATS or weight.ndim != 2:
        return None
    if getattr(lm_head, "bias", None) is not None or weight.shape[1] != hidden_size:
        return None
    return lm_head


def _whole_lm_head(target: Any, vocab_size: int | None, hidden_size: int) -> torch.Tensor | None:
    """[>= vocab_size, hidden_size] of the target, where this rank holds all of it as floats."""
    lm_head = floating_lm_head(target, hidden_size)
    if lm_head is None or vocab_size is None or lm_head.weight.shape[0] < vocab_size:
        return None
    return lm_head.weight.data
