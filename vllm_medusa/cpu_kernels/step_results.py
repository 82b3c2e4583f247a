"""Fall-backs of the kernels that book a step's results (``v1/worker/gpu/input_batch.py``)."""

import numpy as np
import torch


def get_num_sampled_and_rejected_kernel(
    # [num_reqs] int32, in and out
    num_sampled_ptr: torch.Tensor,
    # [num_reqs] int32, written
    num_rejected_ptr: torch.Tensor,
    # [>= num_reqs] int32
    seq_lens_ptr: torch.Tensor,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32
    prefill_len_ptr: torch.Tensor,
) -> None:
    """Count rejected rows, logits minus sampled; a chunk of a prompt has neither.

    Examples
    --------
    4 logits rows and 2 sampled tokens: 2 rejected. Inside the prompt: 0 and 0.
    """
    reqs = idx_mapping_ptr.numpy()
    num_reqs = len(reqs)
    bounds = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    in_prompt = seq_lens_ptr.numpy()[:num_reqs] < prefill_len_ptr.numpy()[reqs]
    num_sampled = num_sampled_ptr.numpy()[:num_reqs]
    num_rejected = num_rejected_ptr.numpy()[:num_reqs]
    np.subtract(bounds[1:] - bounds[:-1], num_sampled, out=num_rejected)
    if in_prompt.any():
        num_sampled[in_prompt] = 0
        num_rejected[in_prompt] = 0


def post_update_kernel(
    # [num_reqs], batch row -> request index; negative: skip the row
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32, in and out
    num_computed_tokens_ptr: torch.Tensor,
    # [max_num_reqs, 1] int64, written
    last_sampled_tokens_ptr: torch.Tensor,
    # [max_num_reqs, vocab_size] int32, in and out, or None
    output_bin_counts_ptr: torch.Tensor | None,
    output_bin_counts_stride: int,
    # [num_reqs, num_columns] int64
    sampled_tokens_ptr: torch.Tensor,
    sampled_tokens_stride: int,
    # [num_reqs] int32
    num_sampled_ptr: torch.Tensor,
    # [num_reqs] int32
    num_rejected_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32, or None: no query rows to count
    query_start_loc_ptr: torch.Tensor | None,
    # [max_num_reqs, max_model_len] int32, written
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    # [max_num_reqs] int32, in and out
    total_len_ptr: torch.Tensor,
    **launch_options: int,
) -> None:
    """Append the sampled tokens to each request and advance its counters.

    Examples
    --------
    Sampled ``[8, 9, -1]`` with 2 counted, 3 query rows and 1 rejected: 8 and 9 are
    appended, the last token is 9, the length grows by 2 and computed by 2.
    """
    reqs = idx_mapping_ptr.numpy()
    num_sampled = num_sampled_ptr.numpy()[: len(reqs)]
    computed_delta = -num_rejected_ptr.numpy()[: len(reqs)]
    if query_start_loc_ptr is not None:
        starts = query_start_loc_ptr.numpy()[: len(reqs) + 1]
        computed_delta = computed_delta + (starts[1:] - starts[:-1])
    if (reqs < 0).any():
        kept = reqs >= 0
        num_computed_tokens_ptr.numpy()[reqs[kept]] += computed_delta[kept]
    else:
        kept = slice(None)
        num_computed_tokens_ptr.numpy()[reqs] += computed_delta

    columns = np.arange(sampled_tokens_ptr.shape[1])
    taken = columns < num_sampled[:, None]
    taken[reqs < 0] = False
    rows, columns = np.nonzero(taken)
    if len(rows) == 0:
        return
    total_len = total_len_ptr.numpy()
    tokens = sampled_tokens_ptr.numpy()[rows, columns]
    token_reqs = reqs[rows]
    all_token_ids_ptr.numpy()[token_reqs, total_len[token_reqs] + columns] = tokens
    # `nonzero` goes row by row, so the last write to a request is its last token.
    last_sampled_tokens_ptr.numpy().reshape(-1)[token_reqs] = tokens
    total_len[reqs[kept]] += num_sampled[kept]
    if output_bin_counts_ptr is not None:
        counts = output_bin_counts_ptr.numpy()
        if sampled_tokens_ptr.shape[1] == 1:
            counts[token_reqs, tokens] += 1
        else:
            # Unbuffered and slower: a token sampled twice by one request counts twice.
            np.add.at(counts, (token_reqs, tokens), 1)


def post_update_num_computed_tokens_kernel(
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32, in and out
    num_computed_tokens_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr: torch.Tensor,
) -> None:
    """Advance each request by its query length (pipeline stages other than the last).

    Examples
    --------
    12 tokens computed and a query of 5: 17.
    """
    reqs = idx_mapping_ptr.numpy()
    starts = query_start_loc_ptr.numpy()[: len(reqs) + 1]
    num_computed_tokens_ptr.numpy()[reqs] += starts[1:] - starts[:-1]
