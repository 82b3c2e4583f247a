"""Fall-back of the prompt-embeddings kernel (``v1/worker/gpu/model_states/prompt_embeds.py``)."""

import ctypes

import torch


def apply_prompt_embeds_kernel(
    # [max_num_tokens, hidden_size], written
    inputs_embeds_ptr: torch.Tensor,
    inputs_embeds_stride: int,
    # [max_num_reqs] uint64 addresses of [embeds_len, hidden_size]
    embeds_ptrs_ptr: torch.Tensor,
    # [max_num_reqs] uint64 addresses of [embeds_len] uint8, 0: every row is an embedding
    mask_ptrs_ptr: torch.Tensor,
    # [max_num_reqs] int32, 0: the request has no embeddings
    embeds_lens_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr: torch.Tensor,
    # [max_num_reqs] int32
    num_computed_tokens_ptr: torch.Tensor,
    hidden_size: int,
    TOKEN_BLOCK: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the scheduled rows of each request's prompt embeddings over its token embeddings.

    Rows whose mask is set are token ids and keep what is there.

    Examples
    --------
    5 embeddings, 3 tokens computed, a query of 4: rows 3 and 4 go to the query's first two.
    """
    starts = query_start_loc_ptr.tolist()
    addresses, masks = embeds_ptrs_ptr.numpy(), mask_ptrs_ptr.numpy()
    for row, request in enumerate(idx_mapping_ptr.tolist()):
        computed = int(num_computed_tokens_ptr[request])
        left = int(embeds_lens_ptr[request]) - computed
        num_rows = min(starts[row + 1] - starts[row], left)
        if num_rows <= 0:
            continue
        target = inputs_embeds_ptr[starts[row] : starts[row] + num_rows]
        row_bytes = hidden_size * target.element_size()
        source = _bytes_at(int(addresses[request]) + computed * row_bytes, num_rows * row_bytes)
        rows = source.view(target.dtype).view(num_rows, hidden_size)
        if masks[request]:
            is_token = _bytes_at(int(masks[request]) + computed, num_rows).bool()
            rows = torch.where(is_token[:, None], target, rows)
        target.copy_(rows)


def _bytes_at(address: int, size: int) -> torch.Tensor:
    """Memory of a live tensor, as [size] uint8."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
