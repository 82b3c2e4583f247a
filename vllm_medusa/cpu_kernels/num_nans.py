"""Fall-back of the NaN counter (``v1/worker/gpu/metrics/logits.py``)."""

import torch


def num_nans_kernel(
    # [num_rows, vocab_size]
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_rows] int32, written
    num_nans_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Count the NaNs of each row.

    Examples
    --------
    Logits ``[[1, nan, nan]]`` give ``[2]``.
    """
    num_nans_ptr.copy_(torch.isnan(logits_ptr[:, :vocab_size]).sum(dim=-1))
