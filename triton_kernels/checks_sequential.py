"""Argument checks of what sequential heads read and add, and of the twins; no Triton here."""

from __future__ import annotations

import torch

from .checks import FLOATS, at_least, check_tensor, require

# Columns of a row that one program holds at once.
MAX_SIZE = 32768



def check_embed_paths(
    out: torch.Tensor,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    root_tokens: torch.Tensor,
    paths: torch.Tensor,
    embeddings: torch.Tensor,
) -> None:
    """Raise ValueError unless the arguments are what ``embed_paths`` documents."""
    device = hidden.device
    check_tensor("hidden", hidden, shape=[None, None], dtype=FLOATS, device=device)
    num_reqs, size = hidden.shape
    require(1 <= size <= MAX_SIZE, "hidden", f"{size} columns", f"1..{MAX_SIZE} columns")
    check_tensor("paths", paths, shape=[None, None], dtype=torch.int64, device=device)
    num_parents, depth = paths.shape
    require(depth >= 1, "paths", f"{depth} tokens", "at least 1")
    for name, tensor, shape, dtype in (
        ("out", out, [num_reqs * num_parents, depth + 1, size], hidden.dtype),
        ("tokens", tokens, [at_least(num_reqs), None], torch.int64),
        ("root_tokens", root_tokens, [num_reqs], torch.int64),
        ("embeddings", embeddings, [None, size], FLOATS),
    ):
        check_tensor(name, tensor, shape=shape, dtype=dtype, device=device)
    for name, tensor in (("out", out), ("paths", paths)):
        require(tensor.is_contiguous(), name, f"strides {tensor.stride()}", "a contiguous tensor")


def check_add_update(
    out: torch.Tensor, states: torch.Tensor, update: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise ValueError unless the arguments are what ``add_update`` documents."""
    device = states.device
    check_tensor("states", states, shape=[None, None], dtype=FLOATS, device=device)
    for name, tensor in (("out", out), ("update", update)):
        check_tensor(name, tensor, shape=states.shape, dtype=states.dtype, device=device)
    if bias is not None:
        shape = [states.shape[1]]
        check_tensor("bias", bias, shape=shape, dtype=states.dtype, device=device)
