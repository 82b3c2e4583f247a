"""What prompt lookup reads and works in; integers and tensors only, no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Tokens beyond which a longer match tells nothing more.
MAX_MATCH = 8
# Of a key's 31 bits those that hold a position; the match's length stands above them.
POSITION_BITS = 26


class LookupWorkspace(NamedTuple):
    """Scratch of ``lookup_chain`` for up to so many requests."""

    keys: torch.Tensor  # [>= R] int32, zeros between calls, by themselves
    counters: torch.Tensor  # [>= R] int32, likewise

    @classmethod
    def allocate(cls, num_reqs: int, device: torch.device) -> LookupWorkspace:
        """Zeros for `num_reqs` requests."""
        return cls(*(torch.zeros(num_reqs, dtype=torch.int32, device=device) for _ in range(2)))


class Chains(NamedTuple):
    """One further path of every request, beside the heads' (see ``lookup_chain``)."""

    tokens: torch.Tensor  # [>= R, L] int64
    matches: torch.Tensor  # [>= R] int32, 0: none
    # [MAX_MATCH + 1, L] float32: negative log probability of the first L tokens behind a match
    # of so many tokens, never falling; infinite for none.
    costs: torch.Tensor
