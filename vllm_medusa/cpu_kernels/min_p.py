"""Fall-back of the min-p kernel (``v1/worker/gpu/sample/min_p.py``)."""

import numpy as np
import torch


def min_p_kernel(
    # [num_tokens, vocab_size], in place
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_tokens], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] float32
    min_p_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Mask tokens less likely than ``min_p`` times the likeliest of their row.

    Examples
    --------
    ``min_p`` 0.5 and logits ``[2, 1, 1.9]``: the bar is 2 + log(0.5) = 1.31, so the
    second becomes minus infinity.
    """
    logits = logits_ptr[:, :vocab_size]
    with np.errstate(divide="ignore"):
        # min_p 0 gives a bar of minus infinity, which masks nothing.
        log_min_p = np.log(min_p_ptr.numpy()[expanded_idx_mapping_ptr.numpy()])
    bar = logits.amax(dim=-1).float() + torch.from_numpy(log_min_p)
    logits.masked_fill_(logits < bar[:, None], float("-inf"))
