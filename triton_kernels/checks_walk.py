"""Argument checks of the walk and its twin; no Triton here."""

from __future__ import annotations

import torch

from .checks import FLOATS, MAX_TREE_ROWS, at_least, check_tensor, require, word_axis
from .walk_types import RequestState, WalkOutput


def check_tree_walk(
    out: WalkOutput,
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    positions: torch.Tensor,
    cu_num_logits: torch.Tensor,
    seq_lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    parents: torch.Tensor,
    prefill_len: torch.Tensor,
    *,
    accept_limits: torch.Tensor | None,
    hidden_states: torch.Tensor | None,
    state: RequestState | None,
) -> None:
    """Raise ValueError unless the arguments are what ``tree_walk`` documents."""
    device, integers = sampled.device, (torch.int64, torch.int32)
    num_logits, num_reqs = sampled.shape[0], idx_mapping.shape[0]
    rows, reqs = [at_least(num_logits)], [at_least(num_reqs)]
    slots = [parents.shape[0]] if parents.dim() else [None]
    checks = [
        ("sampled", sampled, [None], torch.int64),
        ("draft_tokens", draft_tokens, rows, integers),
        ("positions", positions, rows, torch.int64),
        ("cu_num_logits", cu_num_logits, [at_least(num_reqs + 1)], torch.int32),
        ("seq_lens", seq_lens, reqs, torch.int32),
        ("idx_mapping", idx_mapping, [None], integers),
        ("parents", parents, [None, None], torch.int32),
        ("prefill_len", prefill_len, slots, torch.int32),
        ("out.tokens", out.tokens, [at_least(num_reqs), None], torch.int64),
        ("out.num_sampled", out.num_sampled, reqs, torch.int32),
        ("out.num_rejected", out.num_rejected, reqs, torch.int32),
        ("out.root_positions", out.root_positions, reqs, torch.int64),
        ("out.last_rows", out.last_rows, reqs, torch.int64),
    ]
    if out.flat_rows is not None:
        checks.append(("out.flat_rows", out.flat_rows, rows, torch.int64))
    if accept_limits is not None:
        checks.append(("accept_limits", accept_limits, reqs, torch.int32))
    for name, tensor, shape, dtype in checks:
        check_tensor(name, tensor, shape=shape, dtype=dtype, device=device)
    width = parents.shape[1]
    found, expected = f"{width} columns", f"1..{MAX_TREE_ROWS} columns"
    require(1 <= width <= MAX_TREE_ROWS, "parents", found, expected)
    shape = [*reqs, *word_axis(width)]
    check_tensor("out.path_masks", out.path_masks, shape=shape, dtype=torch.int64, device=device)
    strides = f"strides {list(out.path_masks.stride())}"
    require(out.path_masks.is_contiguous(), "out.path_masks", strides, "a dense tensor")
    columns = out.tokens.shape[1]
    require(1 <= columns <= width, "out.tokens", f"{columns} columns", f"1..{width} (parents)")
    _check_hidden(out.hidden, hidden_states, num_reqs, num_logits, device)
    if state is not None:
        _check_state(state, parents.shape[0], device)


def _check_hidden(
    out_hidden: torch.Tensor | None,
    hidden_states: torch.Tensor | None,
    num_reqs: int,
    num_logits: int,
    device: torch.device,
) -> None:
    found = "None" if out_hidden is None else "a tensor"
    both = (out_hidden is None) == (hidden_states is None)
    require(both, "out.hidden", found, "a tensor exactly if hidden_states is given")
    if hidden_states is None:
        return
    shape = [at_least(num_logits), None]
    check_tensor("hidden_states", hidden_states, shape=shape, dtype=FLOATS, device=device)
    shape = [at_least(num_reqs), hidden_states.shape[1]]
    check_tensor("out.hidden", out_hidden, shape=shape, dtype=hidden_states.dtype, device=device)


def _check_state(state: RequestState, num_slots: int, device: torch.device) -> None:
    one, table = [num_slots], [num_slots, None]
    for name, tensor, shape, dtype in (
        ("num_computed_tokens", state.num_computed_tokens, one, torch.int32),
        ("last_sampled", state.last_sampled, one, torch.int64),
        ("total_len", state.total_len, one, torch.int32),
        ("all_token_ids", state.all_token_ids, table, torch.int32),
        ("output_counts", state.output_counts, table, torch.int32),
    ):
        if tensor is not None or name != "output_counts":
            check_tensor(f"state.{name}", tensor, shape=shape, dtype=dtype, device=device)
