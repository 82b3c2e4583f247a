"""Fall-back of the bad-words kernel (``v1/worker/gpu/sample/bad_words.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.token_spans import span_offsets


def bad_words_kernel(
    # [num_tokens, vocab_size], in place
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_tokens], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs, max_tokens] int32, words end to end
    bad_word_token_ids_ptr: torch.Tensor,
    bad_word_token_ids_stride: int,
    # [max_num_reqs, max_words + 1] int32, start of each word
    bad_word_offsets_ptr: torch.Tensor,
    bad_word_offsets_stride: int,
    # [max_num_reqs] int32
    num_bad_words_ptr: torch.Tensor,
    # [max_num_reqs, max_model_len] int32
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    # [max_num_reqs] int32, twice
    prompt_len_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
    # [num_tokens], input token of each row
    input_ids_ptr: torch.Tensor,
    # [num_tokens] int32, place of the row within its request
    expanded_local_pos_ptr: torch.Tensor,
) -> None:
    """Mask the last token of each bad word whose other tokens end the output so far.

    Examples
    --------
    Bad word ``[4, 7]`` and output ``[..., 4]``: token 7 gets minus infinity.
    """
    all_reqs = expanded_idx_mapping_ptr.numpy()
    num_words = num_bad_words_ptr.numpy()[all_reqs]
    # One pair a (row, bad word of its request).
    rows = np.repeat(np.arange(len(all_reqs)), num_words)
    words = span_offsets(num_words)
    reqs = all_reqs[rows]
    offsets = bad_word_offsets_ptr.numpy()
    starts, ends = offsets[reqs, words], offsets[reqs, words + 1]
    prefix_lens = ends - starts - 1

    local_pos = expanded_local_pos_ptr.numpy()[rows]
    prompt_lens = prompt_len_ptr.numpy()[reqs]
    output_lens = total_len_ptr.numpy()[reqs] - prompt_lens
    effective_lens = output_lens + local_pos
    fits = prefix_lens <= effective_lens
    prefix_lens = np.where(fits, prefix_lens, 0)

    # One element a (pair, token of the word's prefix).
    pairs = np.repeat(np.arange(len(rows)), prefix_lens)
    place = span_offsets(prefix_lens)
    word_tokens = bad_word_token_ids_ptr.numpy()
    expected = word_tokens[reqs[pairs], starts[pairs] + place]
    position = (effective_lens - prefix_lens)[pairs] + place
    beyond = position - output_lens[pairs]
    # Input 0 of a request is its last committed token; drafts start at input 1.
    draft_index = (rows - local_pos)[pairs] + np.maximum(beyond, 0) + 1
    input_ids = input_ids_ptr.numpy()
    drafts = input_ids[np.minimum(draft_index, len(input_ids) - 1)]
    committed_index = prompt_lens[pairs] + np.minimum(position, output_lens[pairs] - 1)
    committed = all_token_ids_ptr.numpy()[reqs[pairs], committed_index]
    actual = np.where(beyond >= 0, drafts, committed)

    mismatches = np.bincount(pairs[expected != actual], minlength=len(rows))
    hits = np.flatnonzero(fits & (mismatches == 0))
    last_tokens = word_tokens[reqs[hits], ends[hits] - 1].astype(np.int64)
    logits_ptr[torch.from_numpy(rows[hits]), torch.from_numpy(last_tokens)] = float("-inf")
