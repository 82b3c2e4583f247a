"""Fall-back of the multi-dimensional RoPE kernel (``v1/worker/gpu/mm/rope.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.token_spans import span_offsets


def prepare_rope_positions_kernel(
    # [NUM_DIMS, max_num_tokens] int64, written
    positions_ptr: torch.Tensor,
    positions_stride: int,
    # [max_num_reqs * NUM_DIMS, max_model_len] int32
    prefill_positions_ptr: torch.Tensor,
    prefill_positions_stride0: int,
    prefill_positions_stride1: int,
    # [max_num_reqs] int32
    prefill_delta_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr: torch.Tensor,
    # [max_num_reqs] int32, twice
    prefill_lens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    BLOCK_SIZE: int,
    NUM_DIMS: int,
) -> None:
    """Write each token's position in every RoPE dimension.

    Inside the prefill it is looked up; beyond, it is the index plus the request's delta.

    Examples
    --------
    Past the prefill with 10 tokens computed and delta -3: position 7 in each dimension.
    """
    reqs = idx_mapping_ptr.numpy()
    starts = query_start_loc_ptr.numpy()[: len(reqs) + 1]
    lengths = starts[1:] - starts[:-1]
    computed = num_computed_tokens_ptr.numpy()[reqs]
    in_prefill = np.repeat(computed < prefill_lens_ptr.numpy()[reqs], lengths)
    index = np.repeat(computed, lengths) + span_offsets(lengths)
    req_of_token = np.repeat(reqs, lengths)
    beyond = index + prefill_delta_ptr.numpy()[req_of_token]
    table = prefill_positions_ptr.numpy().reshape(-1)
    first = np.where(in_prefill, req_of_token * prefill_positions_stride0 + index, 0)
    positions = positions_ptr.numpy()
    for dim in range(NUM_DIMS):
        looked_up = table[first + np.where(in_prefill, dim * prefill_positions_stride1, 0)]
        positions[dim, starts[0] : starts[-1]] = np.where(in_prefill, looked_up, beyond)
