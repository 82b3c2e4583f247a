"""Memory that a draft works in; integers and tensors only, no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Tokens whose maximum stands for all of them; a power of two.
GROUP = 128
# Groups whose maxima one program takes: 32 x 128 bfloat16 are 64 bytes a thread of 4 warps.
GROUPS_PER_PROGRAM = 32
# Large batches have programs enough: of more groups each, with more loads in flight and fewer
# announcements, once 32 groups a program would fill an H100 (132 multiprocessors, 8 each) twice.
MANY_PROGRAMS = 2112
# Ranks of a head.
MAX_TOP = 128


def num_groups(vocab_size: int) -> int:
    """Groups of tokens in a row of logits."""
    return -(-vocab_size // GROUP)


def num_chunks(vocab_size: int) -> int:
    """Most programs that share a row of logits."""
    return -(-num_groups(vocab_size) // GROUPS_PER_PROGRAM)


def groups_and_warps(num_rows: int, vocab_size: int, most_groups: int) -> tuple[int, int]:
    """Groups of a program, at most `most_groups`, and its warps, for so many rows of logits."""
    if num_rows * num_chunks(vocab_size) > MANY_PROGRAMS:
        return most_groups, 8
    return GROUPS_PER_PROGRAM, 4


class DraftWorkspace(NamedTuple):
    """Scratch of ``draft_tree`` and ``top_tokens``, for up to so many rows of logits.

    Calls may share it, one after another.
    """

    counters: torch.Tensor  # [>= R * K] int32, zeros between calls, by themselves
    maxima: torch.Tensor  # [>= R * K * num_groups(V)] int32
    # [>= R * K * num_chunks(V) * 2] float32: each chunk's maximum and its sum of exponentials
    sums: torch.Tensor
    picks: torch.Tensor  # [>= R * K * MAX_TOP] int32

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device) -> DraftWorkspace:
        """Allocate for `num_rows` = requests * heads rows of `vocab_size` logits."""
        return cls(
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.empty(num_rows * num_groups(vocab_size), dtype=torch.int32, device=device),
            torch.empty(num_rows * num_chunks(vocab_size) * 2, device=device),
            torch.empty(num_rows * MAX_TOP, dtype=torch.int32, device=device),
        )
