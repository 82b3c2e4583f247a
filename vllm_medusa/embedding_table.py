"""The target's input embeddings as a table, where looking one up is reading its row."""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_medusa.draft_vocabulary import FLOATS


@torch.inference_mode()
def embedding_table(target: nn.Module, hidden_size: int) -> torch.Tensor | None:
    """Table [at least vocab_size, hidden_size] that ``target.embed_input_ids`` reads.

    None where it does anything else with the ids, as with a sharded or quantised table, a scale
    or a norm of its own.
    """
    tables = [
        module
        for module in target.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    if len(tables) != 1 or tables[0].tp_size > 1:
        return None
    weight = getattr(tables[0], "weight", None)
    if weight is None or weight.dtype not in FLOATS or weight.shape[1:] != (hidden_size,):
        return None
    ids = torch.arange(min(len(weight), tables[0].org_vocab_size), device=weight.device)[:64]
    is_plain = torch.equal(target.embed_input_ids(ids), weight[ids])
    return weight.data if is_plain else None
