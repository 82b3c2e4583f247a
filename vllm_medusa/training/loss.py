"""Medusa-1 loss, ``sum_k lambda_k * CE_k``, through the lm_head in chunks.

With 4 heads and 49,152 words the logits of 16,384 tokens would take 6.4 GB in bf16, and as much
again for their gradient. The gradient of a row's loss with respect to its hidden state and to the
lm_head is known once its logits are; so forward already computes all of them for a chunk of rows
of one head, and only gradients of hidden size (and of the heads' own matrices) are kept.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

# Rows of a label table that no head is asked for (beyond the answer's end).
IGNORE = -100


def _cross_entropy_chunk(
    # [rows, vocab]
    logits: Tensor,
    # [rows] int64, IGNORE where there is no label
    labels: Tensor,
    # [] float32
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum of the rows' cross entropies (unscaled) and its gradient times ``scale``."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    valid = labels != IGNORE
    target = labels.clamp(min=0).unsqueeze(1)
    log_z = torch.logsumexp(wide, dim=1)
    losses = torch.where(valid, log_z - wide.gather(1, target).squeeze(1), 0.0)
    factor = torch.where(valid, scale, 0.0).to(wide.dtype).unsqueeze(1)
    words = torch.arange(logits.shape[1], device=logits.device)
    grad = (torch.exp(wide - log_z.unsqueeze(1)) - (words == target).to(wide.dtype)) * factor
    return losses.sum(), grad.to(logits.dtype)


@lru_cache(maxsize=1)
def _compiled_cross_entropy() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_cross_entropy_chunk, dynamic=False)


def _chunk_function(logits: Tensor, chunk_rows: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiled for whole chunks on a GPU only: batches of conversations end with chunks of ever
    other sizes, and each would be compiled anew until the compiler gives up on all of them."""
    whole = logits.is_cuda and logits.shape[0] == chunk_rows
    return _compiled_cross_entropy() if whole else _cross_entropy_chunk


class _ChunkedHeadLoss(torch.autograd.Function):
    """Forward computes loss and gradients; backward only scales the gradients."""

    @staticmethod
    def forward(ctx, hidden, output_weight, labels, head_weights, chunk_rows):
        num_heads, num_rows, _ = hidden.shape
        counts = (labels != IGNORE).sum(dim=0).clamp(min=1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        means = hidden.new_zeros(num_heads, dtype=wide)
        grad = torch.empty_like(hidden)
        # Sums over all chunks, so in float32; as large as the matrices themselves.
        grad_weight = None
        if output_weight.requires_grad:
            grad_weight = torch.zeros_like(output_weight, dtype=wide)
        for k in range(num_heads):
            own = min(k, output_weight.shape[0] - 1)
            weight = output_weight[own]
            scale = (head_weights[k] / counts[k]).to(means.dtype)
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, start + chunk_rows)
                logits = functional.linear(hidden[k, rows], weight)
                # A copy of its own: the compiled function knows one stride and alignment.
                own_labels = labels[rows, k].clone(memory_format=torch.contiguous_format)
                cross_entropy = _chunk_function(logits, chunk_rows)
                total, grad_logits = cross_entropy(logits, own_labels, scale)
                means[k] += total
                torch.mm(grad_logits, weight, out=grad[k, rows])
                if grad_weight is not None:
                    grad_weight[own] += grad_logits.T @ hidden[k, rows]
        means = means / counts
        ctx.save_for_backward(grad, grad_weight)
        ctx.weight_dtype = output_weight.dtype
        return (means * head_weights.to(means.dtype)).sum(), means

    @staticmethod
    def backward(ctx, grad_loss, _grad_means):
        grad, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad * grad_loss.to(grad.dtype), grad_weight, None, None, None


def medusa_one_loss(
    # [num_heads, rows, hidden]
    hidden: Tensor,
    # [vocab, hidden], frozen; or [1 or num_heads, vocab, hidden], trained
    lm_head_weight: Tensor,
    # [rows, num_heads] int64, IGNORE where a head has no label
    labels: Tensor,
    head_weights: Sequence[float],
    chunk_rows: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Weighted loss of all heads and each head's mean cross entropy.

    Parameters
    ----------
    hidden : Tensor
        Head ``k`` (from 1) is row ``k - 1``; gradients flow back to it only.
    lm_head_weight : Tensor
        The base model's lm_head, same dtype as ``hidden``: a matrix gets no gradient, whatever
        its flags say. A stack of matrices belongs to the heads and gets one.
    labels : Tensor
        Column ``k - 1`` holds the token ``k + 1`` places after the row's position.
    head_weights : sequence of float
        ``lambda_k``; each head's cross entropy is averaged over its own labels first.
    chunk_rows : int
        Rows whose logits exist at once.

    Returns
    -------
    tuple[Tensor, Tensor]
        Scalar loss and [num_heads] mean cross entropies, float32 (float64 for float64 input).
    """
    num_heads, num_rows, size = hidden.shape
    if labels.shape != (num_rows, num_heads):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected {(num_rows, num_heads)}, one column "
            "a head"
        )
    if lm_head_weight.shape[-1] != size or lm_head_weight.dtype != hidden.dtype:
        raise ValueError(
            f"lm_head_weight is {tuple(lm_head_weight.shape)} {lm_head_weight.dtype}; expected "
            f"[vocab, {size}] {hidden.dtype}, as hidden"
        )
    if len(head_weights) != num_heads:
        raise ValueError(f"head_weights has {len(head_weights)} entries; expected {num_heads}")
    weights = torch.tensor(tuple(head_weights), device=hidden.device, dtype=torch.float64)
    if hidden.dtype != torch.float64:
        weights = weights.float()
    if lm_head_weight.ndim == 2:
        lm_head_weight = lm_head_weight.detach().unsqueeze(0)
    if lm_head_weight.shape[0] not in (1, num_heads):
        raise ValueError(
            f"lm_head_weight holds {lm_head_weight.shape[0]} matrices; expected 1 or {num_heads}"
        )
    return _ChunkedHeadLoss.apply(hidden, lm_head_weight, labels, weights, chunk_rows)


def medusa_one_loss_reference(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, head_weights: Sequence[float]
) -> Tensor:
    """The same loss as a plain loop over heads and rows; slow, for tests."""
    loss = hidden.new_zeros(())
    for k, weight in enumerate(head_weights):
        losses = []
        for row in range(hidden.shape[1]):
            label = int(labels[row, k])
            if label != IGNORE:
                matrix = lm_head_weight
                if matrix.ndim == 3:
                    matrix = matrix[k if len(matrix) > 1 else 0]
                log_p = torch.log_softmax(matrix @ hidden[k, row], dim=0)
                losses.append(-log_p[label])
        if losses:
            loss = loss + weight * torch.stack(losses).mean()
    return loss
