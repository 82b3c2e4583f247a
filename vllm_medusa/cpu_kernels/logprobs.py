"""Fall-backs of the log-probability kernels (``sample/logprob.py``, ``prompt_logprob.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.token_spans import span_offsets


def topk_log_softmax_kernel(
    # [num_rows, topk] float32, written
    output_ptr: torch.Tensor,
    # [num_rows, vocab_size]
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_rows, topk] int64
    topk_ids_ptr: torch.Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Log-probabilities of the listed tokens, computed in float32.

    Examples
    --------
    Two equal logits: each token has log(1/2) = -0.693.
    """
    logits = logits_ptr[:, :vocab_size].float()
    row_max = logits.amax(dim=-1, keepdim=True)
    log_sum = (logits - row_max).exp_().sum(dim=-1, keepdim=True).log_()
    chosen = logits.gather(1, topk_ids_ptr[:, :topk])
    torch.sub(chosen - row_max, log_sum, out=output_ptr)


def ranks_kernel(
    # [num_rows] int64, written
    output_ptr: torch.Tensor,
    # [num_rows, vocab_size]
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_rows] int64
    token_ids_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Rank of each row's token: how many logits are at least as large as its own.

    Examples
    --------
    Logits ``[3, 1, 2]`` and token 2: rank 2.
    """
    logits = logits_ptr[:, :vocab_size]
    own = logits.gather(1, token_ids_ptr[:, None].long())
    output_ptr.copy_((logits >= own).sum(dim=-1))


def fill_logprob_token_ids_kernel(
    # [num_rows, 1 + num_cols] int64, written
    out_token_ids_ptr: torch.Tensor,
    out_token_ids_stride: int,
    # [num_rows, 1 + num_cols] bool, written
    out_valid_mask_ptr: torch.Tensor,
    out_valid_mask_stride: int,
    # [num_rows] int64
    sampled_token_ids_ptr: torch.Tensor,
    # [num_rows, NUM_TOPK] int32, not read when NUM_TOPK is 0
    topk_indices_ptr: torch.Tensor,
    topk_indices_stride: int,
    # [num_rows], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32
    num_per_req_token_ids_ptr: torch.Tensor,
    # [max_num_reqs, max_ids] int32
    per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    PADDED_COLS: int,
) -> None:
    """List the sampled token, then the tokens a request asks for, or else its top-k.

    Examples
    --------
    Sampled 9, request's own list ``[4, 5]``, 3 columns: ``[9, 4, 5, .]``, the last invalid.
    """
    token_ids = out_token_ids_ptr.numpy()
    valid_mask = out_valid_mask_ptr.numpy()
    token_ids[:, 0] = sampled_token_ids_ptr.numpy()
    valid_mask[:, 0] = True
    reqs = expanded_idx_mapping_ptr.numpy()
    num_custom = num_per_req_token_ids_ptr.numpy()[reqs]
    if NUM_TOPK > 0:
        rows = np.flatnonzero(num_custom <= 0)
        token_ids[rows, 1 : 1 + NUM_TOPK] = topk_indices_ptr.numpy()[rows, :NUM_TOPK]
        valid_mask[rows, 1 : 1 + NUM_TOPK] = True
    rows = np.repeat(np.arange(len(reqs)), num_custom)
    columns = span_offsets(num_custom)
    token_ids[rows, 1 + columns] = per_req_token_ids_ptr.numpy()[reqs[rows], columns]
    valid_mask[rows, 1 + columns] = True


def prompt_logprobs_token_ids_kernel(
    # [num_tokens] int64, written
    prompt_logprobs_token_ids_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32
    num_computed_tokens_ptr: torch.Tensor,
    # [max_num_reqs, max_model_len] int32
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """Give each query row the token that follows it, whose probability it predicts.

    Examples
    --------
    Prompt ``[4, 5, 6]`` with nothing computed and 2 rows scheduled: ``[5, 6]``.
    """
    reqs = idx_mapping_ptr.numpy()
    starts = query_start_loc_ptr.numpy()[: len(reqs) + 1]
    lengths = starts[1:] - starts[:-1]
    tokens = all_token_ids_ptr.numpy()
    following = np.repeat(num_computed_tokens_ptr.numpy()[reqs] + 1, lengths)
    following = following + span_offsets(lengths)
    # The last row of a full-length request has no next token; its value is not used.
    np.minimum(following, tokens.shape[1] - 1, out=following)
    output = prompt_logprobs_token_ids_ptr.numpy()
    output[starts[0] : starts[-1]] = tokens[np.repeat(reqs, lengths), following]
