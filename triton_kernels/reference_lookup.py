"""Plain PyTorch twin of prompt lookup; needs no Triton."""

from __future__ import annotations

import torch

from .checks_draft import check_lookup
from .lookup_types import MAX_MATCH, LookupWorkspace


def lookup_chain(
    chain: torch.Tensor,  # [>= R, L] int64, out
    matches: torch.Tensor,  # [>= R] int32, out
    history: torch.Tensor,  # [S, max_len] int32
    lengths: torch.Tensor,  # [S] int32
    slots: torch.Tensor,  # [R]
    *,
    vocab_size: int,
    workspace: LookupWorkspace | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.lookup.lookup_chain`; needs no workspace."""
    check_lookup(chain, matches, history, lengths, slots, vocab_size, workspace)
    steps = torch.arange(chain.shape[1], device=chain.device)
    for r, slot in enumerate(slots.tolist()):
        tokens = history[slot, : int(lengths[slot])] if slot >= 0 else history[0, :0]
        match, first = longest_match(tokens)
        matches[r], chain[r] = 0, -1
        if match:
            found = tokens[first + steps % (len(tokens) - first)]
            if bool(((found >= 0) & (found < vocab_size)).all()):
                matches[r], chain[r] = match, found


def longest_match(tokens: torch.Tensor) -> tuple[int, int]:
    """Newest tokens found before, and where what followed them begins; (0, 0) without."""
    ends = (tokens[:-1] == tokens[-1:]).nonzero().flatten()
    if not len(ends):
        return 0, 0
    match = 1
    while match < min(MAX_MATCH, len(tokens)):
        longer = ends[ends >= match]
        longer = longer[tokens[longer - match] == tokens[-1 - match]]
        if not len(longer):
            break
        ends, match = longer, match + 1
    return match, int(ends[-1]) + 1
