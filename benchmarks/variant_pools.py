"""What sequential heads think of every node of a fixed tree, row by row of some answers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vllm_medusa.heads import MedusaHeads
from vllm_medusa.sequential_draft import SequentialDrafter
from vllm_medusa.sequential_heads import SequentialHeads
from vllm_medusa.training.hidden_states import HiddenStateSet
from vllm_medusa.training.simulate import Path_, pool_places
from vllm_medusa.tree import TokenTree

# Requests that the drafter gives whole trees at once.
_AT_ONCE = 8


@torch.inference_mode()
def places_in_pool(
    heads: MedusaHeads,
    paths: tuple[Path_, ...],
    data: HiddenStateSet,
    # [rows, num_heads]
    ranks: np.ndarray,
    # [vocab, hidden] each
    embeddings: Tensor,
    lm_head: Tensor,
) -> np.ndarray:
    """Draft the tree at every row, as it is served, and place its right nodes."""
    sequential = SequentialHeads(heads.to_weights(), lm_head.device)
    drafter, found = SequentialDrafter(sequential, TokenTree.from_paths(paths), _AT_ONCE), []
    for start in range(0, data.num_rows, _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        _, log_probs = drafter.score(
            data.hidden[rows], data.labels[rows, 0].long(), embeddings,
            lambda states: functional.linear(states, lm_head),
        )  # fmt: skip
        found.append(log_probs.flatten(1)[:, : len(paths)].clone())
    return pool_places(ranks, torch.cat(found).cpu().numpy(), paths)
