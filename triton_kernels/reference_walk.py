"""Plain PyTorch twin of the walk; needs no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import WORD_BITS
from .checks_walk import check_tree_walk
from .walk_types import RequestState, WalkOutput


def path_rows(path_mask: int | Sequence[int]) -> list[int]:
    """Rows of a path mask, one word or several, in ascending order.

    Examples
    --------
    >>> path_rows(0b1101), path_rows([0b1, 0b10])
    ([0, 2, 3], [0, 65])
    """
    words = [path_mask] if isinstance(path_mask, int) else path_mask
    return [
        WORD_BITS * index + bit
        for index, word in enumerate(words)
        for bit in range(WORD_BITS)
        if word >> bit & 1
    ]


def tree_walk(
    out: WalkOutput,
    sampled: torch.Tensor,  # [num_logits] int64
    draft_tokens: torch.Tensor,  # [num_logits] int64 or int32
    positions: torch.Tensor,  # [num_logits] int64
    cu_num_logits: torch.Tensor,  # [>= R+1] int32
    seq_lens: torch.Tensor,  # [>= R] int32
    idx_mapping: torch.Tensor,  # [R] int64, batch row -> request slot
    parents: torch.Tensor,  # [max_num_reqs, W] int32, row -> parent row
    prefill_len: torch.Tensor,  # [max_num_reqs] int32
    *,
    accept_limits: torch.Tensor | None = None,  # [>= R] int32
    hidden_states: torch.Tensor | None = None,  # [num_logits, hidden_size]
    state: RequestState | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.walk.tree_walk`."""
    check_tree_walk(
        out, sampled, draft_tokens, positions, cu_num_logits, seq_lens, idx_mapping, parents,
        prefill_len, accept_limits=accept_limits, hidden_states=hidden_states, state=state,
    )  # fmt: skip
    slots = idx_mapping.clamp(min=0).long()
    # Only the batch's rows: the tables have one for every request slot of the server.
    own_parents = parents[slots].tolist()
    limits = [parents.shape[1]] * len(slots) if accept_limits is None else accept_limits.tolist()
    prompts, lengths = prefill_len[slots].tolist(), seq_lens.tolist()
    cu, all_tokens, all_drafts = cu_num_logits.tolist(), sampled.tolist(), draft_tokens.tolist()
    for r, idx in enumerate(idx_mapping.tolist()):
        start, num_rows = cu[r], cu[r + 1] - cu[r]
        root_position = int(positions[start]) if num_rows else 0
        prompt_len = prompts[r] if idx >= 0 else 0
        limit = limits[r] if idx >= 0 and root_position >= prompt_len else 0
        tokens = all_tokens[start : start + num_rows]
        drafts = all_drafts[start : start + num_rows]
        path = _follow(own_parents[r], drafts, tokens, limit)
        last_row = start + (path[-1] if path else 0)
        num_sampled = 0 if lengths[r] < prompt_len else len(path)
        num_rejected = 0 if lengths[r] < prompt_len else num_rows - len(path)
        _write_path(out, r, path, tokens)
        out.num_sampled[r], out.num_rejected[r] = num_sampled, num_rejected
        out.root_positions[r], out.last_rows[r] = root_position, last_row
        if out.flat_rows is not None:
            rows = path + list(range(len(path), num_rows))
            out.flat_rows[start : start + num_rows] = start + torch.tensor(rows, dtype=torch.int64)
        if hidden_states is not None:
            out.hidden[r] = hidden_states[last_row] if num_rows else 0
        if state is not None and idx >= 0:
            new = [tokens[row] for row in path][:num_sampled]
            _advance_request(state, idx, new, num_rows - num_rejected)


def _follow(parents: list[int], drafts: list[int], tokens: list[int], limit: int) -> list[int]:
    """Accepted rows of one request, root first; none for a request without rows."""
    path = [0] if tokens else []
    while path and len(path) <= limit:
        current = path[-1]
        children = (
            row
            for row in range(current + 1, min(len(tokens), len(parents)))
            if parents[row] == current and drafts[row] == tokens[current] >= 0
        )
        child = next(children, None)
        if child is None:
            break
        path.append(child)
    return path


def _write_path(out: WalkOutput, r: int, path: list[int], tokens: list[int]) -> None:
    """Tokens of the path and, where they leave room, its mask behind them."""
    num_words = 1 if out.path_masks.dim() == 1 else out.path_masks.shape[1]
    mask = sum(1 << row for row in path)
    words = [mask >> WORD_BITS * index & (1 << WORD_BITS) - 1 for index in range(num_words)]
    words = [word - (word >> 63 << WORD_BITS) for word in words]  # as signed words
    columns = out.tokens.shape[1]
    row_tokens = [tokens[row] for row in path] + [-1] * (columns - len(path))
    if len(path) <= columns - num_words:
        row_tokens[-num_words:] = words
    out.tokens[r] = torch.tensor(row_tokens[:columns], dtype=torch.int64)
    out.path_masks[r] = torch.tensor(words).view(out.path_masks.shape[1:])


def _advance_request(state: RequestState, idx: int, tokens: list[int], num_computed: int) -> None:
    """Append tokens to a request's output and advance its counters."""
    length = int(state.total_len[idx])
    new = torch.tensor(tokens, dtype=torch.int32)
    state.all_token_ids[idx, length : length + len(tokens)] = new
    state.total_len[idx] += len(tokens)
    state.num_computed_tokens[idx] += num_computed
    if tokens:
        state.last_sampled[idx] = tokens[-1]
    for token in tokens if state.output_counts is not None else []:
        state.output_counts[idx, token] += 1
