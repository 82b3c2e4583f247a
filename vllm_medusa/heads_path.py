"""What sequential heads add: the path's embeddings in front of the first layer (Hydra).

Head k of ``x + SiLU(W x + b)`` becomes ``x + SiLU(W x + sum_j P_kj e_j + b)`` in its first layer,
with e_1 the embedding of the root's token and e_2 .. e_k those of the path below it: everything
that lies between the hidden state and the token that the head predicts. With P = 0 it is the
Medusa head.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vllm_medusa.head_weights import HeadSpec


def normalise(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings scaled to a mean square of 1 over the last dimension, same dtype.

    Some models multiply embeddings by a constant inside the module and some outside of it;
    heads that ignore the scale work with either.
    """
    # One launch, in float32 inside; composed of operators it was seven, at every level of a tree.
    return functional.rms_norm(embeddings, embeddings.shape[-1:], eps=1e-20)


def check_path(spec: HeadSpec, num_tokens: int, path_embeddings: torch.Tensor | None) -> None:
    """Refuse embeddings that are missing, superfluous or of another shape."""
    if spec.sequential == (path_embeddings is None):
        raise ValueError(
            f"path_embeddings: found {'None' if path_embeddings is None else 'a tensor'}, but "
            f"sequential is {spec.sequential}; give the path's embeddings exactly to sequential "
            "heads"
        )
    wanted = (num_tokens, spec.num_heads, spec.hidden_size)
    if path_embeddings is not None and tuple(path_embeddings.shape) != wanted:
        raise ValueError(
            f"path_embeddings: found shape {list(path_embeddings.shape)}, expected {list(wanted)}"
        )


def head_rows(head: int) -> slice:
    """Rows of ``path_weight`` that belong to head ``head`` (from 1).

    >>> [head_rows(k) for k in (1, 2, 3)]
    [slice(0, 1, None), slice(1, 3, None), slice(3, 6, None)]
    """
    return slice(head * (head - 1) // 2, head * (head + 1) // 2)


def path_update(
    # [num_path_weights, hidden_size, hidden_size]
    path_weight: torch.Tensor,
    # [n, at least head, hidden_size]
    path_embeddings: torch.Tensor,
    head: int,
) -> torch.Tensor:
    """``sum_j P_kj e_j`` of one head (from 1), [n, hidden_size]."""
    seen = normalise(path_embeddings[:, :head])
    # Einsum would bring d next to j first, a copy of all matrices: 1 GB a step for an 8B model.
    weight = path_weight[head_rows(head)]
    return torch.bmm(seen.transpose(0, 1), weight.transpose(1, 2)).sum(0)


def path_updates(
    # [num_path_weights, hidden_size, hidden_size]
    path_weight: torch.Tensor,
    # [n, num_heads, hidden_size]
    path_embeddings: torch.Tensor,
) -> torch.Tensor:
    """The same of all heads, [n, num_heads, hidden_size]."""
    heads = range(1, path_embeddings.shape[1] + 1)
    return torch.stack([path_update(path_weight, path_embeddings, k) for k in heads], dim=1)
