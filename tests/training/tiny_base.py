"""A random Llama of a few thousand weights and answers that it can learn."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.training.conversations import ConversationSet

VOCAB, HIDDEN = 40, 16
END = 2  # closes answers, and would be the padding of many tokenizers


def make_base(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "eos_token_id": END, "bos_token_id": None, "pad_token_id": END,
        "tie_word_embeddings": False, **overrides,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def counting_answers(count: int = 40, length: int = 12) -> ConversationSet:
    """Answers that count upwards from the prompt's number and end with END."""
    rng = np.random.default_rng(0)
    pairs = []
    for start in rng.integers(3, 20, count):
        stop = int(start) + int(rng.integers(4, length))
        pairs.append(([1, start], [*range(start + 1, stop), END]))
    return ConversationSet.from_pairs(pairs)
