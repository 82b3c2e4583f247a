"""Fall-backs of the penalty kernels (``v1/worker/gpu/sample/penalties.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.token_spans import span_offsets


def penalties_kernel(
    # [num_tokens, vocab_size], in place
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_tokens], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [num_tokens], input token of each row
    token_ids_ptr: torch.Tensor,
    # [num_tokens] int32, place of the row within its request
    expanded_local_pos_ptr: torch.Tensor,
    # [max_num_reqs] float32, three times
    repetition_penalty_ptr: torch.Tensor,
    frequency_penalty_ptr: torch.Tensor,
    presence_penalty_ptr: torch.Tensor,
    # [max_num_reqs, ceil(vocab_size / 32)] int32 bits
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    # [max_num_reqs, vocab_size] int32
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Apply repetition, frequency and presence penalties, counting earlier drafts too.

    Examples
    --------
    Logit 2 of a token that was output twice, with repetition 2, frequency 0.1 and
    presence 0.3: 2 / 2 - 0.2 - 0.3 = 0.5.
    """
    reqs = expanded_idx_mapping_ptr.numpy()
    repetition = repetition_penalty_ptr.numpy()[reqs]
    frequency = frequency_penalty_ptr.numpy()[reqs]
    presence = presence_penalty_ptr.numpy()[reqs]
    rows = np.flatnonzero((repetition != 1.0) | (frequency != 0.0) | (presence != 0.0))
    if len(rows) == 0:
        return
    repetition, frequency, presence = (
        torch.from_numpy(penalty[rows])[:, None] for penalty in (repetition, frequency, presence)
    )
    counts = output_bin_counts_ptr.numpy()[reqs[rows]]
    _add_draft_counts(counts, rows, token_ids_ptr.numpy(), expanded_local_pos_ptr.numpy()[rows])
    counts = torch.from_numpy(counts)[:, :vocab_size]
    was_output = counts > 0
    target_rows = torch.from_numpy(rows)
    logits = logits_ptr[target_rows, :vocab_size].float()

    packed = prompt_bin_mask_ptr.numpy()[reqs[rows]].view(np.uint8)
    in_prompt = np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little").view(np.bool_)
    seen = torch.from_numpy(in_prompt) | was_output
    scale = torch.where(seen, repetition, 1.0)
    logits *= torch.where(logits > 0, 1.0 / scale, scale)
    logits -= frequency * counts
    logits -= presence * was_output
    logits_ptr[target_rows, :vocab_size] = logits.to(logits_ptr.dtype)


def _add_draft_counts(
    # [num_rows, vocab_size] int32, in place
    counts: np.ndarray,
    # [num_rows], rows of the batch
    rows: np.ndarray,
    # [num_tokens]
    token_ids: np.ndarray,
    # [num_rows], place within the request
    local_pos: np.ndarray,
) -> None:
    """Count the drafts before each row: the inputs of places 1 to the row's own."""
    if not local_pos.any():
        return
    first_drafts = np.repeat(rows - local_pos + 1, local_pos)
    drafts = token_ids[first_drafts + span_offsets(local_pos)]
    np.add.at(counts, (np.repeat(np.arange(len(rows)), local_pos), drafts), 1)


def bincount_kernel(
    # [num_new], requests to count
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs, max_model_len] int32
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    # [max_num_reqs] int32
    prompt_len_ptr: torch.Tensor,
    # [max_num_reqs] int32
    prefill_len_ptr: torch.Tensor,
    # [max_num_reqs, ceil(vocab_size / 32)] int32 bits, or-ed
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    # [max_num_reqs, vocab_size] int32, added to
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    """Mark each request's prompt tokens and count the output tokens of its prefill.

    Examples
    --------
    Tokens ``[3, 3, 5]`` with a prompt of 2: bit 3 of the prompt mask, one count of 5.
    """
    reqs = expanded_idx_mapping_ptr.numpy()
    prompt_lens = prompt_len_ptr.numpy()[reqs]
    prefill_lens = prefill_len_ptr.numpy()[reqs]
    tokens = all_token_ids_ptr.numpy()
    masks = prompt_bin_mask_ptr.numpy()

    in_prompt = np.zeros((len(reqs), masks.shape[1] * 32), dtype=np.bool_)
    rows = np.repeat(np.arange(len(reqs)), prompt_lens)
    in_prompt[rows, tokens[reqs[rows], span_offsets(prompt_lens)]] = True
    masks[reqs] |= np.packbits(in_prompt, axis=1, bitorder="little").view(np.int32)

    num_outputs = prefill_lens - prompt_lens
    rows = np.repeat(reqs, num_outputs)
    columns = np.repeat(prompt_lens, num_outputs) + span_offsets(num_outputs)
    np.add.at(output_bin_counts_ptr.numpy(), (rows, tokens[rows, columns]), 1)
