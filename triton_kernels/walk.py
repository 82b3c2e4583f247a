"""Walk the accepted path of every request's token tree on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable, check_tree_walk


@triton.jit
def _tree_walk_kernel(
    out_tokens,  # out [R, N+1] int64
    out_num_sampled,  # out [R] int32
    out_path_masks,  # out [R] int64
    out_last_rows,  # out [R] int64
    out_flat_rows,  # out [num_logits] int64
    sampled,  # in [num_logits] int64
    draft_tokens,  # in [num_logits] int64
    cu_num_logits,  # in [R+1] int32
    parents,  # in [max_num_reqs, W] int32, row -> parent row
    idx_mapping,  # in [R] int64, batch row -> row of `parents`
    accept_limits,  # in [R] int32
    out_tokens_stride,
    parents_stride,
    NUM_COLUMNS: tl.constexpr,  # N+1
    NUM_ROWS: tl.constexpr,  # W
    PADDED_ROWS: tl.constexpr,
):
    """Grid: (R,). One program owns one request: all of its rows sit in registers."""
    req = tl.program_id(0)
    start = tl.load(cu_num_logits + req).to(tl.int64)
    num_rows = tl.load(cu_num_logits + req + 1).to(tl.int64) - start
    idx = tl.load(idx_mapping + req).to(tl.int64)
    limit = tl.load(accept_limits + req)

    rows = tl.arange(0, PADDED_ROWS).to(tl.int64)
    own = rows < num_rows
    tokens = tl.load(sampled + start + rows, mask=own, other=-1)
    drafts = tl.load(draft_tokens + start + rows, mask=own, other=-1)
    tree_rows = tl.where(idx >= 0, NUM_ROWS, 0)
    has_parent = own & (rows < tree_rows) & (rows > 0) & (drafts >= 0)
    parent = tl.load(parents + idx * parents_stride + rows, mask=has_parent, other=-1)

    # State of the walk.  path[j] is the j-th accepted row b_j; beyond the path it stays j.
    path = rows
    accepted = tl.where(rows == 0, tokens, -1)
    current = tl.zeros([], tl.int64)
    current_token = tl.sum(tl.where(rows == 0, tokens, 0))
    path_mask = tl.full([], 1, tl.int64)
    num_accepted = tl.zeros([], tl.int32)
    walking = limit > 0
    while walking:
        # `rows > current` holds for every child of a parents-first tree; asking for it
        # makes the loop end whatever the parents say.
        match = has_parent & (parent == current) & (drafts == current_token) & (rows > current)
        child = tl.min(tl.where(match, rows, PADDED_ROWS))
        found = child < PADDED_ROWS
        if found:
            num_accepted += 1
            current = child
            current_token = tl.sum(tl.where(rows == child, tokens, 0))
            path_mask = path_mask | (tl.full([], 1, tl.int64) << child)
            accepted = tl.where(rows == num_accepted, current_token, accepted)
            path = tl.where(rows == num_accepted, child, path)
        walking = found & (num_accepted < limit)

    num_sampled = tl.where(num_rows > 0, num_accepted + 1, 0)
    path_mask = tl.where(num_rows > 0, path_mask, 0)
    # The last column carries the path to the other pipeline ranks whenever no token needs it.
    packed = (rows == NUM_COLUMNS - 1) & (num_sampled < NUM_COLUMNS)
    accepted = tl.where(packed, path_mask, accepted)
    out_row = out_tokens + req.to(tl.int64) * out_tokens_stride
    tl.store(out_row + rows, accepted, mask=rows < NUM_COLUMNS)
    tl.store(out_num_sampled + req, num_sampled)
    tl.store(out_path_masks + req, path_mask)
    tl.store(out_last_rows + req, start + current)
    tl.store(out_flat_rows + start + rows, start + path, mask=own)


def tree_walk(
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    parents: torch.Tensor,
    idx_mapping: torch.Tensor,
    accept_limits: torch.Tensor,
    out_tokens: torch.Tensor,
    out_num_sampled: torch.Tensor,
    out_path_masks: torch.Tensor,
    out_last_rows: torch.Tensor,
    out_flat_rows: torch.Tensor,
) -> None:
    """Follow the target's tokens down each request's tree (Medusa paper, section 2.3.1).

    From the root, step to the first child whose draft token is the token the target
    drew at the current row, until there is none or the request's limit is reached.

    Parameters
    ----------
    sampled : torch.Tensor
        ``[num_logits]`` int64. Token drawn by the target at each row.
    draft_tokens : torch.Tensor
        ``[num_logits]`` int64. Input token of each row; the root's is not looked at,
        a negative one is not a node.
    cu_num_logits : torch.Tensor
        ``[R + 1]`` int32. Rows ``cu[r] .. cu[r+1]`` are request r's, at most W of them.
    parents : torch.Tensor
        ``[max_num_reqs, W]`` int32. Row -> parent row, -1 at the root; W <= 64.
    idx_mapping : torch.Tensor
        ``[R]`` int64 or int32. Batch row -> row of `parents`; negative: no tree, only the root
        is accepted.
    accept_limits : torch.Tensor
        ``[R]`` int32. Largest number of accepted nodes, 0 = only the root's token.
    out_tokens : torch.Tensor
        ``[R, N + 1]`` int64, N + 1 <= W. Tokens drawn at the accepted rows in order (the last is
        the bonus token), then -1; column N holds the path mask if no token is there.
    out_num_sampled : torch.Tensor
        ``[R]`` int32. Accepted nodes + 1; 0 for a request without rows.
    out_path_masks : torch.Tensor
        ``[R]`` int64. Bit b set iff row b is on the accepted path.
    out_last_rows : torch.Tensor
        ``[R]`` int64. Flat row of the last accepted node.
    out_flat_rows : torch.Tensor
        ``[num_logits]`` int64. ``start + b_j`` on the path, ``start + j`` beyond it.

    Examples
    --------
    Rows 0..3 with parents ``-1 0 0 2``, drafts ``_ 7 8 9``; the target drew ``8 1 9 5``:
    row 2 (8), then row 3 (9) are accepted, so tokens ``8 9 5``, the mask ``0b1101`` in column 3,
    3 sampled tokens, last row 3, flat rows ``0 2 3 3``.
    """
    arguments = (
        sampled, draft_tokens, cu_num_logits, parents, idx_mapping, accept_limits,
        out_tokens, out_num_sampled, out_path_masks, out_last_rows, out_flat_rows,
    )  # fmt: skip
    check_tree_walk(*arguments)
    check_runnable("sampled", sampled, _tree_walk_kernel)
    num_reqs = idx_mapping.shape[0]
    if num_reqs == 0:
        return
    width = parents.shape[1]
    # 64 rows are two per lane of one warp: every reduction stays within the warp.
    _tree_walk_kernel[(num_reqs,)](
        out_tokens, out_num_sampled, out_path_masks, out_last_rows, out_flat_rows,
        sampled, draft_tokens, cu_num_logits, parents, idx_mapping, accept_limits,
        out_tokens.stride(0), parents.stride(0),
        NUM_COLUMNS=out_tokens.shape[1], NUM_ROWS=width,
        PADDED_ROWS=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
