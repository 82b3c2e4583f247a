"""Walk the accepted path of every request's token tree and advance the request, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable, num_words
from .checks_walk import check_tree_walk
from .walk_types import RequestState, WalkOutput

# Elements of a hidden row that one program copies: 64 bytes a lane of bfloat16, all in flight.
_HIDDEN_PER_PROGRAM = 1024


@triton.jit
def _follow_path(
    tokens,  # [PADDED_ROWS] int32, drawn at each row
    drafts,  # [PADDED_ROWS] int32, the row's own token
    parent,  # [PADDED_ROWS] int32, -1 where a row is no node
    rows,  # [PADDED_ROWS] int32, 0, 1, ..
    limit,  # most accepted nodes
    PADDED_ROWS: tl.constexpr,
):
    """The walk: accepted tokens, j -> accepted row b_j (j beyond the path), last row, length.

    All of it in int32, for which a warp reduces in one instruction.
    """
    path = rows
    accepted = tl.where(rows == 0, tokens, -1)
    current = tl.zeros([], tl.int32)
    current_token = tl.sum(tl.where(rows == 0, tokens, 0))
    num_accepted = tl.zeros([], tl.int32)
    walking = limit > 0
    while walking:
        # `rows > current` holds for every child of a parents-first tree; asking for it
        # makes the loop end whatever the parents say.
        match = (parent == current) & (drafts == current_token) & (rows > current)
        child = tl.min(tl.where(match, rows, PADDED_ROWS))
        found = child < PADDED_ROWS
        if found:
            num_accepted += 1
            current = child
            current_token = tl.sum(tl.where(rows == child, tokens, 0))
            accepted = tl.where(rows == num_accepted, current_token, accepted)
            path = tl.where(rows == num_accepted, child, path)
        walking = found & (num_accepted < limit)
    return accepted, path, current, num_accepted


@triton.jit
def _path_word(path, is_path, WORD: tl.constexpr):
    """Bits of the path's rows 64 * WORD and up, int64."""
    bit = tl.full([], 1, tl.int64) << (path & 63).to(tl.int64)
    return tl.sum(tl.where(is_path & (path // 64 == WORD), bit, 0))


@triton.jit
def _advance_request(
    idx,  # int64, request slot
    is_request,  # otherwise nothing is touched
    rows,
    accepted,  # [PADDED_ROWS] int32, tokens drawn at the accepted rows
    num_sampled,
    num_computed_delta,
    num_computed_tokens,
    last_sampled,
    total_len,
    all_token_ids,
    output_counts,
    token_ids_stride,
    counts_stride,
):
    """Append the sampled tokens to a request and advance its counters."""
    num_sampled = tl.where(is_request, num_sampled, 0)
    is_sampled = rows < num_sampled
    length = tl.load(total_len + idx, mask=is_request, other=0)
    computed = tl.load(num_computed_tokens + idx, mask=is_request, other=0)
    tl.store(all_token_ids + idx * token_ids_stride + length + rows, accepted, mask=is_sampled)
    last = tl.sum(tl.where(rows == num_sampled - 1, accepted, 0))
    tl.store(last_sampled + idx, last.to(tl.int64), mask=num_sampled > 0)
    tl.store(total_len + idx, length + num_sampled, mask=is_request)
    tl.store(num_computed_tokens + idx, computed + num_computed_delta, mask=is_request)
    if output_counts is not None:
        # Atomic, because a path may hold one token several times.
        counts = output_counts + idx * counts_stride + accepted
        tl.atomic_add(counts, tl.full(rows.shape, 1, tl.int32), mask=is_sampled, sem="relaxed")


@triton.jit
def _tree_walk_kernel(
    out_tokens,  # out [R, N+1] int64
    out_num_sampled,  # out [R] int32
    out_num_rejected,  # out [R] int32
    out_path_masks,  # out [R] or [R, NUM_WORDS] int64
    out_root_positions,  # out [R] int64
    out_last_rows,  # out [R] int64
    out_flat_rows,  # out [num_logits] int64, or None
    out_hidden,  # out [R, hidden_size], or None
    num_computed_tokens,  # in-place [max_num_reqs] int32; None: requests are not advanced
    last_sampled,  # out [max_num_reqs] int64
    total_len,  # in-place [max_num_reqs] int32
    all_token_ids,  # out [max_num_reqs, max_model_len] int32
    output_counts,  # in-place [max_num_reqs, vocab_size] int32, or None
    sampled,  # in [num_logits] int64
    draft_tokens,  # in [num_logits] int64 or int32
    positions,  # in [num_logits] int64
    cu_num_logits,  # in [R+1] int32
    seq_lens,  # in [R] int32
    idx_mapping,  # in [R] int64, batch row -> request slot
    parents,  # in [max_num_reqs, W] int32, row -> parent row
    accept_limits,  # in [R] int32, or None
    prefill_len,  # in [max_num_reqs] int32
    hidden_states,  # in [num_logits, hidden_size], or None
    out_tokens_stride,
    out_hidden_stride,
    token_ids_stride,
    counts_stride,
    parents_stride,
    hidden_stride,
    HIDDEN_SIZE: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,  # N+1
    NUM_ROWS: tl.constexpr,  # W
    NUM_WORDS: tl.constexpr,  # of a path mask: 1, or 2 for more than 64 rows
    PADDED_ROWS: tl.constexpr,
):
    """Grid: (R, chunks of a hidden row). One program owns one request, its rows in registers.

    The programs of a request walk alike and each copies its chunk of the last accepted row's
    hidden state; the first also writes everything else.
    """
    req = tl.program_id(0)
    start = tl.load(cu_num_logits + req)
    num_rows = tl.load(cu_num_logits + req + 1) - start
    idx = tl.load(idx_mapping + req).to(tl.int64)
    is_request = idx >= 0
    seq_len = tl.load(seq_lens + req)
    prompt_len = tl.load(prefill_len + idx, mask=is_request, other=0)
    limit = PADDED_ROWS
    if accept_limits is not None:
        limit = tl.load(accept_limits + req)
    start = start.to(tl.int64)
    root_position = tl.load(positions + start, mask=num_rows > 0, other=0)
    # A request that starts its step inside the prompt carries placeholder drafts.
    limit = tl.where(is_request & (root_position >= prompt_len), limit, 0)

    rows = tl.arange(0, PADDED_ROWS)
    own = rows < num_rows
    tokens = tl.load(sampled + start + rows, mask=own, other=-1).to(tl.int32)
    drafts = tl.load(draft_tokens + start + rows, mask=own, other=-1).to(tl.int32)
    is_node = own & (rows > 0) & (rows < tl.where(is_request, NUM_ROWS, 0))
    parent = tl.load(parents + idx * parents_stride + rows, mask=is_node, other=-1)
    parent = tl.where(drafts >= 0, parent, -1)
    accepted, path, current, num_accepted = _follow_path(
        tokens, drafts, parent, rows, limit, PADDED_ROWS
    )

    if out_hidden is not None:
        chunk = tl.program_id(1) * HIDDEN_BLOCK + tl.arange(0, HIDDEN_BLOCK)
        row = hidden_states + (start + current) * hidden_stride
        inside = chunk < HIDDEN_SIZE
        values = tl.load(
            row + chunk, mask=chunk < tl.where(num_rows > 0, HIDDEN_SIZE, 0), other=0.0
        )
        tl.store(out_hidden + req.to(tl.int64) * out_hidden_stride + chunk, values, mask=inside)
    if tl.program_id(1) > 0:
        return

    length = tl.where(num_rows > 0, num_accepted + 1, 0)
    # The last columns carry the path to the other pipeline ranks whenever no token needs them.
    packed = (rows == NUM_COLUMNS - NUM_WORDS) & (length <= NUM_COLUMNS - NUM_WORDS)
    out_row = out_tokens + req.to(tl.int64) * out_tokens_stride
    if NUM_WORDS > 1:
        path_mask = _path_word(path, rows < length, 0)
        high_mask = _path_word(path, rows < length, 1)
        packed_high = (rows == NUM_COLUMNS - 1) & (length <= NUM_COLUMNS - NUM_WORDS)
        column = tl.where(packed_high, high_mask, accepted.to(tl.int64))
        column = tl.where(packed, path_mask, column)
        tl.store(out_path_masks + req * NUM_WORDS + 1, high_mask)
    else:
        on_path = tl.where(rows < length, tl.full([], 1, tl.int64) << path.to(tl.int64), 0)
        path_mask = tl.sum(on_path)
        column = tl.where(packed, path_mask, accepted.to(tl.int64))
    tl.store(out_row + rows, column, mask=rows < NUM_COLUMNS)
    in_prompt = seq_len < prompt_len
    num_sampled = tl.where(in_prompt, 0, length)
    num_rejected = tl.where(in_prompt, 0, num_rows - length)
    tl.store(out_num_sampled + req, num_sampled)
    tl.store(out_num_rejected + req, num_rejected)
    tl.store(out_path_masks + req * NUM_WORDS, path_mask)
    tl.store(out_root_positions + req, root_position)
    tl.store(out_last_rows + req, start + current)
    if out_flat_rows is not None:
        tl.store(out_flat_rows + start + rows, start + path, mask=own)
    if num_computed_tokens is not None:
        _advance_request(
            idx, is_request, rows, accepted, num_sampled, num_rows - num_rejected,
            num_computed_tokens, last_sampled, total_len, all_token_ids, output_counts,
            token_ids_stride, counts_stride,
        )  # fmt: skip


def tree_walk(
    out: WalkOutput,
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    positions: torch.Tensor,
    cu_num_logits: torch.Tensor,
    seq_lens: torch.Tensor,
    idx_mapping: torch.Tensor,
    parents: torch.Tensor,
    prefill_len: torch.Tensor,
    *,
    accept_limits: torch.Tensor | None = None,
    hidden_states: torch.Tensor | None = None,
    state: RequestState | None = None,
) -> None:
    """Follow the target's tokens down each request's tree (Medusa paper, section 2.3.1).

    From the root, step to the first child whose draft token is the token the target
    drew at the current row, until there is none or the request's limit is reached.  A request
    whose root lies inside its prompt accepts nothing; one whose rows all do samples nothing.

    Parameters
    ----------
    out : WalkOutput
        Outputs, see there; `flat_rows` and `hidden` are written where they are given.  `tokens` has
        at most W columns, the last of which holds the path mask if no token is there; for
        W > 64 the last two hold its words.
    sampled : torch.Tensor
        ``[num_logits]`` int64. Token drawn by the target at each row, below 2^31.
    draft_tokens : torch.Tensor
        ``[num_logits]`` int64 or int32. Input token of each row; the root's is not looked at,
        a negative one is not a node.
    positions : torch.Tensor
        ``[num_logits]`` int64. Position of each row; only the roots' are read.
    cu_num_logits : torch.Tensor
        ``[>= R + 1]`` int32. Rows ``cu[r] .. cu[r+1]`` are request r's, at most W of them.
    seq_lens : torch.Tensor
        ``[>= R]`` int32. Context and query rows of each request.
    idx_mapping : torch.Tensor
        ``[R]`` int64 or int32. Batch row -> request slot; negative: no request (padding), only
        the root is accepted and no state is touched.
    parents : torch.Tensor
        ``[max_num_reqs, W]`` int32. Row -> parent row, -1 at the root; W <= 128.
    prefill_len : torch.Tensor
        ``[max_num_reqs]`` int32. Prompt length.
    accept_limits : torch.Tensor, optional
        ``[>= R]`` int32. Largest number of accepted nodes, 0 = only the root's token.
    hidden_states : torch.Tensor, optional
        ``[num_logits, hidden_size]``. Given together with ``out.hidden``: its row of the last
        accepted node is copied there.
    state : RequestState, optional
        Advanced in place: tokens appended, ``rows - rejected`` computed tokens more.  For batches
        in which the rows of logits are the whole query.

    Examples
    --------
    Rows 0..3 with parents ``-1 0 0 2``, drafts ``_ 7 8 9``; the target drew ``8 1 9 5``:
    row 2 (8), then row 3 (9) are accepted, so tokens ``8 9 5``, the mask ``0b1101`` in column 3,
    3 sampled tokens, 1 rejected, last row 3, flat rows ``0 2 3 3``.
    """
    inputs = (
        sampled, draft_tokens, positions, cu_num_logits, seq_lens, idx_mapping, parents,
    )  # fmt: skip
    check_tree_walk(
        out, *inputs, prefill_len, accept_limits=accept_limits, hidden_states=hidden_states,
        state=state,
    )  # fmt: skip
    check_runnable("sampled", sampled, _tree_walk_kernel)
    num_reqs, width = idx_mapping.shape[0], parents.shape[1]
    if num_reqs == 0:
        return
    hidden_size = 0 if hidden_states is None else hidden_states.shape[1]
    state = state or RequestState(None, None, None, None, None)
    # 128 rows are four per lane of one warp: every reduction stays within the warp.
    _tree_walk_kernel[(num_reqs, max(1, triton.cdiv(hidden_size, _HIDDEN_PER_PROGRAM)))](
        *out, *state, *inputs, accept_limits, prefill_len, hidden_states,
        out.tokens.stride(0), _row_stride(out.hidden), _row_stride(state.all_token_ids),
        _row_stride(state.output_counts), parents.stride(0), _row_stride(hidden_states),
        HIDDEN_SIZE=hidden_size, HIDDEN_BLOCK=_HIDDEN_PER_PROGRAM,
        NUM_COLUMNS=out.tokens.shape[1], NUM_ROWS=width, NUM_WORDS=num_words(width),
        PADDED_ROWS=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def _row_stride(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
