"""Argument checks of the draft and its twin; integers and tensors only, no Triton here."""

from __future__ import annotations

import torch

from .checks import MAX_TREE_ROWS, at_least, check_tensor, require
from .draft_workspace import GROUP, DraftWorkspace, num_groups

# Groups of one row that the merging program holds at once: 4096 of them are 524,288 tokens.
MAX_GROUPS = 4096
MAX_TOP = 128
MAX_NODES = MAX_TREE_ROWS - 1  # the root is drawn by the target


def check_draft_tree(
    out: torch.Tensor,
    logits: torch.Tensor,
    node_columns: torch.Tensor,
    *,
    num_top: int,
    token_map: torch.Tensor | None,
    workspace: DraftWorkspace | None,
) -> None:
    """Raise ValueError unless the arguments are what ``draft_tree`` documents."""
    device = logits.device
    floats = (torch.bfloat16, torch.float16, torch.float32)
    check_tensor("logits", logits, shape=[None, None, None], dtype=floats, device=device)
    num_reqs, num_heads, vocab = logits.shape
    require(num_heads >= 1, "logits", f"{num_heads} heads", "at least 1")
    found, most = f"{vocab} tokens", GROUP * MAX_GROUPS
    require(1 <= vocab <= most, "logits", found, f"a vocabulary of 1..{most}")
    low = min(vocab, MAX_TOP)
    require(1 <= num_top <= low, "num_top", num_top, f"1..{low} (vocabulary, kernel)")
    check_tensor("node_columns", node_columns, shape=[None], dtype=torch.int64, device=device)
    nodes = node_columns.shape[0]
    require(1 <= nodes <= MAX_NODES, "node_columns", f"{nodes} nodes", f"1..{MAX_NODES} nodes")
    shape = [at_least(num_reqs), nodes]
    check_tensor("out", out, shape=shape, dtype=torch.int64, device=device)
    if token_map is not None:
        shape = [None, vocab]
        check_tensor("token_map", token_map, shape=shape, dtype=torch.int64, device=device)
        maps = token_map.shape[0]
        require(maps in (1, num_heads), "token_map", f"{maps} rows", f"1 or {num_heads} rows")
    if workspace is not None:
        rows = num_reqs * num_heads
        for name, tensor, needed in (
            ("counters", workspace.counters, rows),
            ("maxima", workspace.maxima, rows * num_groups(vocab)),
        ):
            name, shape = f"workspace.{name}", [at_least(needed)]
            check_tensor(name, tensor, shape=shape, dtype=torch.int32, device=device)
