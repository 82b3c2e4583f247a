"""Fall-backs of the thinking-budget kernels (``v1/worker/gpu/sample/thinking_budget.py``).

Requests have markers at different places, so these go request by request; all but
the first scan look at a few tokens.
"""

import numpy as np
import torch

# Written over the logit of the end marker's next token (the kernel's constant).
_FORCED_LOGIT = 1.0e9


def _last_match(tokens: np.ndarray, marker: np.ndarray, low: int, high: int) -> int:
    """Last start in [low, high) at which ``tokens`` holds the whole marker, or -1."""
    high = min(high, len(tokens) - len(marker) + 1)
    if low >= high:
        return -1
    hits = np.ones(high - low, dtype=np.bool_)
    for offset, token in enumerate(marker.tolist()):
        hits &= tokens[low + offset : high + offset] == token
    places = np.flatnonzero(hits)
    return low + int(places[-1]) if len(places) else -1


def update_committed_marker_cache_kernel(
    # [num_reqs], requests to scan
    req_ids_ptr: torch.Tensor,
    # [max_num_reqs] int32, negative: no budget
    thinking_token_budget_ptr: torch.Tensor,
    # [max_num_reqs, max_model_len] int32
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    # [max_num_reqs] int32
    total_len_ptr: torch.Tensor,
    # [max_num_reqs] int32, in and out, three times
    cached_last_start_ptr: torch.Tensor,
    cached_last_end_ptr: torch.Tensor,
    cached_scan_pos_ptr: torch.Tensor,
    # [START_LEN] and [NATURAL_END_LEN] int32
    reasoning_start_token_ids_ptr: torch.Tensor,
    natural_reasoning_end_token_ids_ptr: torch.Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    MAX_LEN: int,
    BLOCK: int,
) -> None:
    """Remember where the last start and end marker of the committed tokens are.

    The first scan goes backward a block at a time and stops at the first block with a
    marker, since only the order of the two matters; later scans take up where the
    previous one stopped.

    Examples
    --------
    Tokens ``[1, 8, 2, 9]`` with start ``[8]`` and end ``[9]``: start 1, end 3, next scan at 4.
    """
    start_marker = reasoning_start_token_ids_ptr.numpy()
    end_marker = natural_reasoning_end_token_ids_ptr.numpy()
    last_starts = cached_last_start_ptr.numpy()
    last_ends = cached_last_end_ptr.numpy()
    scan_positions = cached_scan_pos_ptr.numpy()
    reqs = req_ids_ptr.numpy()
    for req in reqs[thinking_token_budget_ptr.numpy()[reqs] >= 0].tolist():
        total_len = int(total_len_ptr[req])
        tokens = all_token_ids_ptr.numpy()[req, :total_len]
        scan_pos, start, end = int(scan_positions[req]), int(last_starts[req]), int(last_ends[req])
        if scan_pos > total_len:
            scan_pos, start, end = 0, -1, -1
        if scan_pos == 0 and start < 0 and end < 0:
            high = total_len
            while high > 0 and start < 0 and end < 0:
                low = max(high - BLOCK, 0)
                start = _last_match(tokens, start_marker, low, high)
                end = _last_match(tokens, end_marker, low, high)
                high = low
        else:
            start = max(start, _last_match(tokens, start_marker, scan_pos, total_len))
            end = max(end, _last_match(tokens, end_marker, scan_pos, total_len))
        last_starts[req], last_ends[req] = start, end
        scan_positions[req] = max(total_len - (MAX_LEN - 1), 0)


def thinking_budget_kernel(
    # [num_tokens, vocab_size], in place
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_tokens], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int32, negative: no budget
    thinking_token_budget_ptr: torch.Tensor,
    # [max_num_reqs, max_model_len] int32
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    # [max_num_reqs] int32
    total_len_ptr: torch.Tensor,
    # [num_tokens], input token of each row
    input_ids_ptr: torch.Tensor,
    # [num_tokens] int32, place of the row within its request
    expanded_local_pos_ptr: torch.Tensor,
    # [max_num_reqs] int32, twice
    cached_last_start_ptr: torch.Tensor,
    cached_last_end_ptr: torch.Tensor,
    # [START_LEN], [NATURAL_END_LEN] and [END_LEN] int32
    reasoning_start_token_ids_ptr: torch.Tensor,
    natural_reasoning_end_token_ids_ptr: torch.Tensor,
    reasoning_end_token_ids_ptr: torch.Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    END_LEN: int,
) -> None:
    """Force the end marker, token by token, once a request has thought long enough.

    Examples
    --------
    Start at 1, 4 tokens in all, budget 2 and end marker ``[9]``: token 9 is forced.
    """
    start_marker = reasoning_start_token_ids_ptr.numpy()
    natural_end = natural_reasoning_end_token_ids_ptr.numpy()
    end_marker = reasoning_end_token_ids_ptr.numpy()
    budgets = thinking_token_budget_ptr.numpy()[expanded_idx_mapping_ptr.numpy()]
    for row in np.flatnonzero(budgets >= 0).tolist():
        req = int(expanded_idx_mapping_ptr[row])
        local_pos = int(expanded_local_pos_ptr[row])
        total_len = int(total_len_ptr[req])
        first_draft = row - local_pos + 1
        drafts = input_ids_ptr.numpy()[first_draft : first_draft + local_pos]
        # Only the tokens a marker could straddle are copied; `base` is their position.
        base = max(total_len - max(START_LEN, NATURAL_END_LEN, END_LEN), 0)
        tail = np.concatenate([all_token_ids_ptr.numpy()[req, base:total_len], drafts])
        effective_len = total_len + local_pos

        start, end = int(cached_last_start_ptr[req]), int(cached_last_end_ptr[req])
        low = max(total_len - START_LEN + 1, 0) - base
        new_start = _last_match(tail, start_marker, low, len(tail))
        start = base + new_start if new_start >= 0 else start
        low = max(total_len - NATURAL_END_LEN + 1, 0) - base
        new_end = _last_match(tail, natural_end, low, len(tail))
        end = base + new_end if new_end >= 0 else end
        if start < 0 or start <= end or effective_len - start - START_LEN < budgets[row]:
            continue
        logits_ptr[row, int(end_marker[_end_prefix_len(tail, end_marker)])] = _FORCED_LOGIT


def _end_prefix_len(tail: np.ndarray, end_marker: np.ndarray) -> int:
    """Length of the longest proper prefix of the end marker that ``tail`` ends with."""
    for length in range(min(len(end_marker) - 1, len(tail)), 0, -1):
        if np.array_equal(tail[len(tail) - length :], end_marker[:length]):
            return length
    return 0
