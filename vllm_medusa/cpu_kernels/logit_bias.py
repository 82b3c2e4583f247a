"""Fall-back of the logit-bias kernel (``v1/worker/gpu/sample/logit_bias.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.token_spans import span_offsets

_NEG_INF = float("-inf")


def bias_kernel(
    # [num_tokens, vocab_size], in place
    logits_ptr: torch.Tensor,
    logits_stride: int,
    vocab_size: int,
    # [num_tokens], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32
    num_allowed_token_ids_ptr: torch.Tensor,
    # [max_num_reqs, max_allowed] int32
    allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_stride: int,
    # [max_num_reqs] int32
    num_logit_bias_ptr: torch.Tensor,
    # [max_num_reqs, max_bias] int32
    bias_token_ids_ptr: torch.Tensor,
    bias_token_ids_stride: int,
    # [max_num_reqs, max_bias] float32
    bias_ptr: torch.Tensor,
    bias_stride: int,
    # [num_tokens] int64
    pos_ptr: torch.Tensor,
    # [max_num_reqs] int32, twice
    min_lens_ptr: torch.Tensor,
    num_stop_token_ids_ptr: torch.Tensor,
    # [max_num_reqs] bool
    restore_when_all_masked_ptr: torch.Tensor,
    # [max_num_reqs, max_stop] int32
    stop_token_ids_ptr: torch.Tensor,
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    """Keep the allowed tokens, add the bias, and mask stop tokens before the minimum length.

    Examples
    --------
    Allowed ``[1, 2]``, bias ``{1: 0.5}``, logits ``[9, 1, 2]``: ``[-inf, 1.5, 2]``.
    """
    logits = logits_ptr[:, :vocab_size]
    reqs = expanded_idx_mapping_ptr.numpy()
    num_allowed = num_allowed_token_ids_ptr.numpy()[reqs]
    if num_allowed.any():
        rows, tokens = _listed(reqs, num_allowed, allowed_token_ids_ptr)
        kept = logits[rows, tokens]
        logits[torch.from_numpy(num_allowed > 0)] = _NEG_INF
        logits[rows, tokens] = kept

    num_bias = num_logit_bias_ptr.numpy()[reqs]
    if num_bias.any():
        rows, tokens = _listed(reqs, num_bias, bias_token_ids_ptr)
        _, bias = _listed(reqs, num_bias, bias_ptr)
        logits[rows, tokens] = (logits[rows, tokens] + bias).to(logits.dtype)

    too_short = pos_ptr.numpy() + 1 < min_lens_ptr.numpy()[reqs]
    num_stop = np.where(too_short, num_stop_token_ids_ptr.numpy()[reqs], 0)
    if num_stop.any():
        rows, tokens = _listed(reqs, num_stop, stop_token_ids_ptr)
        stopped = logits[rows, tokens]
        logits[rows, tokens] = _NEG_INF
        if CHECK_ALL_MASKED_ROWS:
            restorable = restore_when_all_masked_ptr[expanded_idx_mapping_ptr].bool()
            nothing_left = restorable & (logits.amax(dim=-1) == _NEG_INF)
            back = nothing_left[rows] & torch.isfinite(stopped)
            logits[rows[back], tokens[back]] = stopped[back]


def _listed(
    reqs: np.ndarray, counts: np.ndarray, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten the first ``counts[row]`` entries of each row's list: (row, entry) pairs."""
    rows = np.repeat(np.arange(len(reqs)), counts)
    entries = table.numpy()[reqs[rows], span_offsets(counts)]
    if entries.dtype == np.int32:
        entries = entries.astype(np.int64)
    return torch.from_numpy(rows), torch.from_numpy(entries)
