"""Fall-back of the structured-output kernel (``v1/worker/gpu/structured_outputs.py``)."""

import numpy as np
import torch


def apply_grammar_bitmask_kernel(
    # [num_logits, vocab_size], in place
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_masks] int32, request * MASK_STRIDE + place within the request
    logits_indices_ptr: torch.Tensor,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    # [num_masks, ceil(vocab_size / 32)] int32 bits, 1: the token is allowed
    bitmask_ptr: torch.Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Mask the tokens the grammar forbids at each row it constrains.

    Examples
    --------
    Bits 0b101 over logits ``[1, 2, 3]``: the second becomes minus infinity.
    """
    reqs, places = np.divmod(logits_indices_ptr.numpy(), MASK_STRIDE)
    bounds = cu_num_logits_ptr.numpy()
    starts = bounds[reqs]
    # Rows cut by adaptive verification have a mask but no logits.
    active = np.flatnonzero(places < bounds[reqs + 1] - starts)
    rows = torch.from_numpy((starts + places)[active].astype(np.int64))
    packed = bitmask_ptr.numpy()[active].view(np.uint8)
    allowed = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")
    forbidden = torch.from_numpy(allowed == 0)
    logits = logits_ptr[:, :vocab_size]
    logits[rows] = logits[rows].masked_fill_(forbidden, float("-inf"))
