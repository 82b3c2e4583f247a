"""Weights of heads in float8, with one factor for each row."""

from __future__ import annotations

import torch

DTYPE = torch.float8_e4m3fn
# The largest number of that dtype.
LARGEST = torch.finfo(DTYPE).max
# Rows that are rounded at once: a float32 copy of a whole lm_head would take more than it saves.
_ROWS_AT_ONCE = 8192


@torch.no_grad()
def to_float8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to float8_e4m3fn, each row divided by what makes its largest number 448.

    Parameters
    ----------
    weight : torch.Tensor
        ``[..., O, I]``, floating. Finite, as a checkpoint's weights are.

    Returns
    -------
    rounded : torch.Tensor
        ``[..., O, I]`` float8_e4m3fn, contiguous.
    scale : torch.Tensor
        ``[..., O]`` float32, what the rows were divided by; 1 for rows of zeros.

    Examples
    --------
    >>> rounded, scale = to_float8_rows(torch.tensor([[2.0, -896.0], [0.0, 0.0]]))
    >>> rounded.float().tolist(), scale.tolist()
    ([[1.0, -448.0], [0.0, 0.0]], [2.0, 1.0])
    """
    rounded = torch.empty(weight.shape, dtype=DTYPE, device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    parts = (tensor.view(-1, *tensor.shape[weight.ndim - 1 :]) for tensor in (rounded, scale))
    for rows, into, factors in zip(
        weight.reshape(-1, weight.shape[-1]).split(_ROWS_AT_ONCE),
        *(part.split(_ROWS_AT_ONCE) for part in parts),
        strict=True,
    ):
        rows = rows.float()
        largest = rows.abs().amax(dim=1) / LARGEST
        # Zero also where the largest number is too small to be divided by 448.
        factors.copy_(torch.where(largest > 0, largest, 1.0))
        # Next to float32's smallest numbers the quotient itself is rounded, and may be too small.
        into.copy_((rows / factors[:, None]).clamp(-LARGEST, LARGEST))
    return rounded, scale
