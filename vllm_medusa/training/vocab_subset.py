"""Vocabulary subsets by frequency (FR-Spec): the tokens worth scoring when drafting."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.training.conversations import ConversationSet


def frequent_tokens(answers: ConversationSet, count: int, vocab_size: int) -> Tensor:
    """The ``count`` most frequent answer tokens, ascending ids, [count] int64.

    The model's own answers are what the heads will draft, so they say more than a general
    corpus. Unseen tokens, lowest ids first, fill up a subset larger than what occurs.
    """
    if not 1 <= count <= vocab_size:
        raise ValueError(f"count: found {count}, expected 1..{vocab_size}, the vocabulary")
    ids = answers.token_ids[answers.answer_mask]
    counts = np.bincount(ids, minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")[:count]
    return torch.from_numpy(np.sort(order)).to(torch.int64)


def restrict_vocabulary(weights: HeadWeights, token_ids: Tensor) -> HeadWeights:
    """The same heads scoring ``token_ids`` only; own output matrices lose their other rows.

    No training is needed: what the kept tokens' logits are does not change.
    """
    if weights.token_map is not None:
        raise ValueError("weights: found heads with a vocabulary subset; restrict the whole ones")
    spec = replace(weights.spec, vocab_subset_size=len(token_ids))
    return replace(
        weights, spec=spec, token_map=token_ids.unsqueeze(0),
        lm_head=None if weights.lm_head is None else weights.lm_head[:, token_ids],
    )  # fmt: skip
