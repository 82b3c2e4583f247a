"""What ties a draft to the draw that will judge it; integers and tensors only, no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DrawNoise(NamedTuple):
    """The noise with which vLLM's sampler will draw the tokens that are drafted.

    The sampler's token is the largest of ``logits / temperature + noise``, and its noise is a
    function of the request's seed, the position of the row and the token's id.  A draft that adds
    the same noise to a head's logits therefore names what the sampler would draw, were the head
    right (Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant
    speculative decoding", 2024).  What is drawn does not depend on what was drafted.
    """

    seeds: torch.Tensor  # [S] int64, by request slot
    temperatures: torch.Tensor  # [S] float32; 0: no noise
    lengths: torch.Tensor  # [S] int32, tokens known so far, the root is the last of them
    slots: torch.Tensor  # [R] int64 or int32, negative: no request
    depth: int  # of the nodes that the first head drafts, from 1
    depth_step: int  # 1: every head drafts one deeper than the head before it; 0: all the same
    # By how much heads err, in units of the noise: log probabilities are those of sums divided
    # by it.
    spread: float


def arguments_of(noise: DrawNoise | None) -> tuple[tuple, int]:
    """Kernels' arguments, from seeds to spread, and their DEPTH_STEP; None and zeros without."""
    if noise is None:
        return (None, None, None, None, 0, 1.0), 0
    return (*noise[:5], noise.spread), noise.depth_step
