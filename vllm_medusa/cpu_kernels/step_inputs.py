"""Fall-backs of the kernels that fill a step's inputs (``v1/worker/gpu/input_batch.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.token_spans import span_offsets


def prepare_prefill_inputs_kernel(
    # [max_num_tokens] int32, written
    input_ids_ptr: torch.Tensor,
    # [num_lookahead, max_num_reqs] int32, written
    next_prefill_tokens_ptr: torch.Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr: torch.Tensor,
    # [max_num_reqs, max_model_len] int32
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    # [max_num_reqs] int32
    prefill_lens_ptr: torch.Tensor,
    # [max_num_reqs] int32
    num_computed_tokens_ptr: torch.Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Copy the prompt tokens of this step to the input, and note the ones that follow.

    Requests past their prefill are left alone.

    Examples
    --------
    Prompt ``[4, 5, 6, 7]`` with 1 token computed and 2 scheduled: the input gets
    ``[5, 6]`` and the next prefill token is 7.
    """
    reqs = idx_mapping_ptr.numpy()
    starts = query_start_loc_ptr.numpy()[: len(reqs) + 1]
    computed = num_computed_tokens_ptr.numpy()[reqs]
    prefill_lens = prefill_lens_ptr.numpy()[reqs]
    rows = np.flatnonzero(computed < prefill_lens)
    if len(rows) == 0:
        return
    reqs, computed, prefill_lens = reqs[rows], computed[rows], prefill_lens[rows]
    lengths = starts[rows + 1] - starts[rows]
    tokens = all_token_ids_ptr.numpy()
    input_ids = input_ids_ptr.numpy()
    if len(rows) == 1:
        first, start, length = int(computed[0]), int(starts[rows[0]]), int(lengths[0])
        input_ids[start : start + length] = tokens[reqs[0], first : first + length]
    else:
        offsets = span_offsets(lengths)
        source = tokens[np.repeat(reqs, lengths), np.repeat(computed, lengths) + offsets]
        input_ids[np.repeat(starts[rows], lengths) + offsets] = source
    following = (computed + lengths)[:, None] + np.arange(num_lookahead)
    known = following < prefill_lens[:, None]
    ahead = np.where(known, tokens[reqs[:, None], np.where(known, following, 0)], 0)
    next_prefill_tokens_ptr.numpy()[:, reqs] = ahead.T


def prepare_pos_seq_lens_kernel(
    # [max_num_tokens] int64, written
    pos_ptr: torch.Tensor,
    # [max_num_reqs] int32, written
    seq_lens_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr: torch.Tensor,
    # [max_num_reqs] int32
    num_computed_tokens_ptr: torch.Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Write the position of each token and the length of each sequence after the step.

    Examples
    --------
    7 tokens computed and 3 scheduled: positions ``[7, 8, 9]``, length 10.
    """
    reqs = idx_mapping_ptr.numpy()
    num_reqs = len(reqs)
    starts = query_start_loc_ptr.numpy()[: num_reqs + 1]
    computed = num_computed_tokens_ptr.numpy()[reqs]
    begin, end = int(starts[0]), int(starts[-1])
    positions = pos_ptr.numpy()
    seq_lens = seq_lens_ptr.numpy()
    lengths = starts[1:] - starts[:-1]
    if (lengths == 1).all():
        positions[begin:end] = computed
    else:
        positions[begin:end] = np.repeat(computed - starts[:-1], lengths) + np.arange(begin, end)
    seq_lens[:num_reqs] = computed + lengths
    seq_lens[num_reqs:max_num_reqs] = 0


def combine_sampled_and_draft_tokens_kernel(
    # [max_num_tokens] int32, written
    input_ids_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs, 1] int64
    last_sampled_tokens_ptr: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc_ptr: torch.Tensor,
    # [>= num_reqs] int32
    seq_lens_ptr: torch.Tensor,
    # [max_num_reqs] int32
    prefill_len_ptr: torch.Tensor,
    # [max_num_reqs, num_speculative_steps] int64
    draft_tokens_ptr: torch.Tensor,
    draft_tokens_stride: int,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    # [num_logits] int64, written
    logits_indices_ptr: torch.Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> None:
    """Put the last sampled and the draft tokens at the end of each query; index their rows.

    Requests still inside their prompt only get their logits row; a slot that lies in
    the prompt keeps its prompt token.

    Examples
    --------
    A query of 3 rows at 10..12 with 2 drafts: rows 10, 11, 12 hold the last sampled
    token and the drafts, and the logits indices are ``[10, 11, 12]``.
    """
    reqs = idx_mapping_ptr.numpy()
    num_reqs = len(reqs)
    ends = query_start_loc_ptr.numpy()[1 : num_reqs + 1]
    bounds = cu_num_logits_ptr.numpy()[: num_reqs + 1]
    num_logits = bounds[1:] - bounds[:-1]
    begin, total = int(bounds[0]), int(bounds[-1])
    logits_indices = logits_indices_ptr.numpy()
    has_drafts = total - begin != num_reqs * NUM_NEW_SAMPLED_TOKENS
    if (num_logits == 1).all():
        logits_indices[begin:total] = ends - 1
    else:
        shift = np.repeat(ends - bounds[1:], num_logits)
        logits_indices[begin:total] = shift + np.arange(begin, total)

    seq_lens = seq_lens_ptr.numpy()[:num_reqs]
    prefill_lens = prefill_len_ptr.numpy()[reqs]
    input_ids = input_ids_ptr.numpy()
    if NUM_NEW_SAMPLED_TOKENS > 0:
        sampling = (seq_lens - num_logits >= prefill_lens) & (seq_lens > prefill_lens)
        last_tokens = last_sampled_tokens_ptr.numpy().reshape(-1)[reqs]
        input_ids[(ends - num_logits)[sampling]] = last_tokens[sampling]
    if has_drafts:
        rows = np.flatnonzero(seq_lens > prefill_lens)
        num_drafts = (num_logits - NUM_NEW_SAMPLED_TOKENS)[rows]
        offsets = span_offsets(num_drafts)
        drafts = draft_tokens_ptr.numpy()[np.repeat(reqs[rows], num_drafts), offsets]
        input_ids[np.repeat(ends[rows] - num_drafts, num_drafts) + offsets] = drafts


def expand_idx_mapping_kernel(
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [num_logits] dtype of idx_mapping, written
    expanded_idx_mapping_ptr: torch.Tensor,
    # [num_logits] int32, written
    expanded_local_pos_ptr: torch.Tensor,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Give each logits row its request index and its place within the request.

    Examples
    --------
    Requests ``[5, 2]`` with 2 and 1 rows: indices ``[5, 5, 2]``, places ``[0, 1, 0]``.
    """
    reqs = idx_mapping_ptr.numpy()
    bounds = cu_num_logits_ptr.numpy()[: len(reqs) + 1]
    lengths = bounds[1:] - bounds[:-1]
    begin, end = int(bounds[0]), int(bounds[-1])
    expanded_idx_mapping_ptr.numpy()[begin:end] = np.repeat(reqs, lengths)
    expanded_local_pos_ptr.numpy()[begin:end] = span_offsets(lengths)
