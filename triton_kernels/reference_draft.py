"""Plain PyTorch twin of the draft; needs no Triton."""

from __future__ import annotations

import torch

from .checks_draft import check_draft_tree
from .draft_workspace import DraftWorkspace


def draft_tree(
    out: torch.Tensor,  # [>= R, N] int64
    logits: torch.Tensor,  # [R, K, V]
    node_columns: torch.Tensor,  # [N] int64
    *,
    num_top: int,
    token_map: torch.Tensor | None = None,  # [1 or K, V] int64
    workspace: DraftWorkspace | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.draft.draft_tree`; needs no workspace."""
    check_draft_tree(
        out, logits, node_columns, num_top=num_top, token_map=token_map, workspace=workspace
    )
    num_reqs, num_heads, _ = logits.shape
    ids = best_tokens(logits, num_top)
    if token_map is not None:
        ids = token_map.expand(num_reqs, num_heads, -1).gather(2, ids)
    out[:num_reqs] = ids.flatten(1)[:, node_columns]


def best_tokens(
    logits: torch.Tensor,  # [..., V]
    num_top: int,
) -> torch.Tensor:
    """Ids of the `num_top` largest logits, best first, the lower id first among equals.

    NaN counts as -inf.  ``[..., num_top]`` int64.
    """
    values, ids = logits.topk(num_top, dim=-1)
    # topk leaves the order of equals open, and which of them it takes; sorting the whole
    # vocabulary settles both, but takes a CPU ten times as long, so only where there are any.
    is_open = (values[..., 1:] == values[..., :-1]).any(-1) | values.isnan().any(-1)
    is_open |= (logits == values[..., -1:]).sum(-1) > 1
    if bool(is_open.any()):
        known = torch.where(logits.isnan(), float("-inf"), logits)
        ids = known.sort(dim=-1, descending=True, stable=True).indices[..., :num_top]
    return ids
