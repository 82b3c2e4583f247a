"""Fall-backs of the n-gram speculator's kernels (``v1/worker/gpu/spec_decode/ngram``)."""

import numpy as np
import torch


def ngram_scan_kernel(
    # [max_num_reqs, max_model_len] int32
    token_ids_ptr: torch.Tensor,
    token_ids_stride: int,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32
    total_len_ptr: torch.Tensor,
    # [num_reqs] int32
    num_sampled_ptr: torch.Tensor,
    # [max_num_reqs, num_blocks] int64, written: best match of the row in block 0
    scratch_ptr: torch.Tensor,
    scratch_stride: int,
    L: int,
    MIN_N: int,
    MAX_N: int,
    MAX_N_PO2: int,
    BLOCK_L: int,
    **launch_options: int,
) -> None:
    """Find the longest, then rightmost, earlier copy of each sequence's last tokens.

    A match of n tokens at position p scores ``n * (L + 1) + p + 1``; no match scores 0.

    Examples
    --------
    ``[5, 6, 7, 5, 6]`` with n from 1 to 2: the last two tokens recur at 0, n = 2.
    """
    reqs = idx_mapping_ptr.numpy()
    num_reqs = len(reqs)
    lengths = total_len_ptr.numpy()[reqs].astype(np.int64)
    scratch = scratch_ptr.numpy()
    scratch[:num_reqs] = 0
    width = int(lengths.max(initial=0))
    if width == 0:
        return
    tokens = token_ids_ptr.numpy()[reqs, :width]
    positions = np.arange(width)
    eligible = (num_sampled_ptr.numpy()[:num_reqs] > 0) & (lengths >= MIN_N)
    rows = np.arange(num_reqs)
    # matches[r, p]: the n tokens from p on equal the sequence's last n tokens.
    matches = np.broadcast_to(eligible[:, None], tokens.shape)
    for n in range(1, MAX_N + 1):
        oldest = tokens[rows, np.maximum(lengths - n, 0)]
        # The suffix grows to the left, so its new first token is compared at p and
        # the shorter match must start at p + 1.
        longer = np.zeros_like(matches)
        longer[:, : width - 1 if n > 1 else width] = matches[:, 1:] if n > 1 else matches
        matches = longer & (tokens == oldest[:, None]) & (lengths >= n)[:, None]
        if n >= MIN_N:
            # The suffix itself, at lengths - n, is no match.
            usable = matches & (positions <= (lengths - n - 1)[:, None])
            last = width - 1 - usable[:, ::-1].argmax(axis=1)
            found = usable.any(axis=1)
            score = n * (L + 1) + last + 1
            scratch[:num_reqs, 0] = np.where(found, score, scratch[:num_reqs, 0])


def ngram_finalize_kernel(
    # [max_num_reqs, max_model_len] int32
    token_ids_ptr: torch.Tensor,
    token_ids_stride: int,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32
    total_len_ptr: torch.Tensor,
    # [num_reqs] int32
    num_sampled_ptr: torch.Tensor,
    # [max_num_reqs] int64
    last_sampled_ptr: torch.Tensor,
    # [max_num_reqs, num_blocks] int64
    scratch_ptr: torch.Tensor,
    scratch_stride: int,
    # [max_num_reqs, K] int64, written
    drafts_ptr: torch.Tensor,
    L: int,
    N_BLOCKS: int,
    K: int,
    K_PO2: int,
    N_BLOCKS_PO2: int,
    **launch_options: int,
) -> None:
    """Draft the tokens that followed the match; pad with the last sampled token.

    Examples
    --------
    ``[5, 6, 7, 5, 6]``, match of 2 at position 0, 3 drafts: ``[7, 5, 6]``.
    """
    reqs = idx_mapping_ptr.numpy()
    num_reqs = len(reqs)
    score = scratch_ptr.numpy()[:num_reqs].max(axis=1)
    matched = (score > 0) & (num_sampled_ptr.numpy()[:num_reqs] > 0)
    n, position = np.divmod(score - 1, L + 1)
    first = np.where(matched, n + position, 0)
    index = first[:, None] + np.arange(K)
    known = matched[:, None] & (index < total_len_ptr.numpy()[reqs][:, None])
    following = token_ids_ptr.numpy()[reqs[:, None], np.minimum(index, L - 1)]
    last_tokens = last_sampled_ptr.numpy()[reqs][:, None]
    drafts_ptr.numpy()[:num_reqs] = np.where(known, following, last_tokens)
