"""Plain PyTorch twins of what lies between the products of sequential heads; need no Triton."""

from __future__ import annotations

import torch
from torch.nn import functional

from .checks_sequential import check_add_update, check_embed_paths


def embed_paths(
    out: torch.Tensor,  # [R * P, 1 + D, H]
    hidden: torch.Tensor,  # [R, H]
    tokens: torch.Tensor,  # [>= R, W] int64
    root_tokens: torch.Tensor,  # [R] int64
    paths: torch.Tensor,  # [P, D] int64
    embeddings: torch.Tensor,  # [V, H]
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.sequential.embed_paths`."""
    check_embed_paths(out, hidden, tokens, root_tokens, paths, embeddings)
    num_reqs, size = hidden.shape
    inputs = out.view(num_reqs, *paths.shape[:1], -1, size)
    # The root's token behind the others, where the column -1 finds it.
    known = torch.cat([tokens[:num_reqs], root_tokens[:, None]], dim=1)
    ids = known[:, paths.clamp(min=-1)].clamp(min=0)
    inputs[:, :, 0] = hidden[:, None]
    rows = embeddings[ids].to(hidden.dtype)
    inputs[:, :, 1:] = functional.rms_norm(rows, [size], eps=1e-20)


def add_update(
    out: torch.Tensor,  # [N, H]
    states: torch.Tensor,  # [N, H]
    update: torch.Tensor,  # [N, H]
    bias: torch.Tensor | None = None,  # [H]
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.sequential.add_update`."""
    check_add_update(out, states, update, bias)
    whole = update.float() if bias is None else update.float() + bias.float()
    out.copy_(states.float() + functional.silu(whole))
