"""Fall-back of the kernel behind ``return_sampling_mask`` (``v1/worker/gpu/sample/output.py``)."""

import numpy as np
import torch


def compact_sampling_mask_kernel(
    # [num_logits, vocab_size]
    logits_ptr: torch.Tensor,
    logits_row_stride: int,
    logits_col_stride: int,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    # [num_reqs] int32
    num_sampled_tokens_ptr: torch.Tensor,
    # [num_reqs * ROWS_PER_REQUEST, max_num_kept] int32, written
    token_ids_ptr: torch.Tensor,
    token_ids_row_stride: int,
    # [num_reqs * ROWS_PER_REQUEST, ceil(vocab_size / 8)] uint8, written
    packed_mask_ptr: torch.Tensor,
    packed_mask_row_stride: int,
    # [num_reqs * ROWS_PER_REQUEST] int32, written
    counts_ptr: torch.Tensor,
    vocab_size: int,
    max_num_kept: int,
    ROWS_PER_REQUEST: int,
    BLOCK_SIZE: int,
) -> None:
    """List the tokens that could be sampled at each row: first ids, count and bit mask.

    Examples
    --------
    Logits ``[1, -inf, 2]``: ids ``[0, 2]``, count 2, bits 0b101.
    """
    num_sampled = num_sampled_tokens_ptr.numpy()
    slots = np.arange(ROWS_PER_REQUEST)
    used = (slots < num_sampled[:, None]).reshape(-1)
    sources = (cu_num_logits_ptr.numpy()[: len(num_sampled), None] + slots).reshape(-1)[used]
    outputs = np.flatnonzero(used)
    kept = torch.isfinite(logits_ptr[torch.from_numpy(sources.astype(np.int64))]).numpy()
    counts = counts_ptr.numpy()
    counts[:] = 0
    counts[outputs] = kept.sum(axis=1)
    packed_mask_ptr.numpy()[outputs] = np.packbits(kept, axis=1, bitorder="little")
    place = kept.cumsum(axis=1) - 1
    rows, tokens = np.nonzero(kept & (place < max_num_kept))
    token_ids_ptr.numpy()[outputs[rows], place[rows, tokens]] = tokens
