"""Fall-backs of the row kernels of ``v1/worker/gpu/spec_decode/rejection_sampler.py``."""

import numpy as np
import torch


def flatten_sampled_kernel(
    # [num_logits] int64, written
    flat_sampled_ptr: torch.Tensor,
    # [num_reqs, num_speculative_steps + 1] int64
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    # [num_reqs] int32
    num_sampled_ptr: torch.Tensor,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    **launch_options: int,
) -> None:
    """Put each request's sampled tokens at the start of its logits rows.

    Examples
    --------
    Sampled ``[[7, 8, .]]``, 2 counted, rows 0..2: ``[7, 8, unchanged]``.
    """
    sampled = sampled_ptr.numpy()
    taken = np.arange(sampled.shape[1]) < num_sampled_ptr.numpy()[:, None]
    rows, columns = np.nonzero(taken)
    flat_sampled_ptr.numpy()[cu_num_logits_ptr.numpy()[rows] + columns] = sampled[rows, columns]


def gather_draft_sampled_kernel(
    # [num_logits] int32, written
    draft_sampled_ptr: torch.Tensor,
    # [num_logits] int64, written
    pos_ptr: torch.Tensor,
    # [num_tokens] int32
    input_ids_ptr: torch.Tensor,
    # [num_tokens] int64
    positions_ptr: torch.Tensor,
    # [num_logits] int64
    logits_indices_ptr: torch.Tensor,
    # [num_logits], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [num_logits] int32, place of the row within its request
    expanded_local_pos_ptr: torch.Tensor,
    # [max_num_reqs] int32
    prefill_len_ptr: torch.Tensor,
    num_logits: int,
    BLOCK_SIZE: int,
) -> None:
    """Input token and position of each logits row; drafts padded in a prefill become -1.

    Examples
    --------
    Row at place 1, position 5, of a request with a prefill of 6: the draft is -1.
    """
    indices = logits_indices_ptr.numpy()
    positions = positions_ptr.numpy()[indices]
    places = expanded_local_pos_ptr.numpy()
    prefill_lens = prefill_len_ptr.numpy()[expanded_idx_mapping_ptr.numpy()]
    placeholder = (places > 0) & (positions - places < prefill_lens)
    draft_sampled_ptr.numpy()[:] = np.where(placeholder, -1, input_ids_ptr.numpy()[indices])
    pos_ptr.numpy()[:] = positions
