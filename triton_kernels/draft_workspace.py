"""Memory that a draft works in; integers and tensors only, no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Tokens whose maximum stands for all of them; a power of two.
GROUP = 128


def num_groups(vocab_size: int) -> int:
    """Groups of tokens in a row of logits."""
    return -(-vocab_size // GROUP)


class DraftWorkspace(NamedTuple):
    """Scratch of ``draft_tree``, for up to so many rows of logits; calls may share it in turn."""

    counters: torch.Tensor  # [>= R * K] int32, zeros between calls, by themselves
    maxima: torch.Tensor  # [>= R * K * num_groups(V)] int32

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> DraftWorkspace:
        """Allocate for `num_rows` = requests * heads rows of `vocab_size` logits."""

        return cls(
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.empty(num_rows * num_groups(vocab_size), dtype=torch.int32, device=device),
        )
