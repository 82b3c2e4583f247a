"""Heads of the kind that the settings ask for."""

import torch
from torch import Tensor

from vllm_medusa.training.config import HeadKind
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.training.vocab_subset import frequent_tokens


def new_heads(
    kind: HeadKind,
    # [vocab, hidden]
    lm_head_weight: Tensor,
    answers: ConversationSet,
    device: torch.device | str,
) -> TrainableHeads:
    """Untrained heads; a vocabulary subset holds the answers' most frequent tokens."""
    vocab_size, hidden_size = lm_head_weight.shape
    spec = kind.head_spec(hidden_size, vocab_size)
    ids = None
    if kind.vocab_subset is not None:
        ids = frequent_tokens(answers, kind.vocab_subset, vocab_size)
    return TrainableHeads.from_spec(spec, lm_head_weight, ids, device)
