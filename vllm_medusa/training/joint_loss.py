"""The language model's part of the joint loss, in chunks of rows (paper 2.2.2 and 2.3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vllm_medusa.training.loss import IGNORE


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of ``-log p(label)`` over rows with a label, float32.

    Parameters
    ----------
    logits : Tensor
        [rows, vocab]
    labels : Tensor
        [rows] int64, IGNORE where there is none.
    """
    return functional.cross_entropy(_wide(logits), labels, ignore_index=IGNORE, reduction="sum")


def divergence(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of ``KL(p_teacher || p)`` over rows with a label, float32."""
    log_p = torch.log_softmax(_wide(logits), dim=-1)
    log_t = torch.log_softmax(_wide(teacher_logits), dim=-1)
    rows = (log_t.exp() * (log_t - log_p)).sum(-1)
    return torch.where(labels == IGNORE, 0.0, rows).sum()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def chunked_mean(
    loss: Callable[..., Tensor],
    # [rows, ...] each, cut alike
    tensors: tuple[Tensor, ...],
    # [rows] int64
    labels: Tensor,
    chunk_rows: int,
) -> Tensor:
    """Mean over labelled rows of ``loss(*chunks, labels)``, a sum over a chunk.

    Each chunk's logits are computed again in backward instead of being kept: with 128k words and
    4096 rows they would take 2 GB in float32, and several times that in a cross entropy.
    """
    total = tensors[0].new_zeros((), dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for start in range(0, len(labels), chunk_rows):
        rows = slice(start, start + chunk_rows)
        chunks = [tensor[rows] for tensor in tensors]
        total = total + checkpoint(loss, *chunks, labels[rows], use_reentrant=False)
    return total / (labels != IGNORE).sum().clamp(min=1)
