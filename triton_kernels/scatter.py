"""Write tree positions and ancestor masks of a verify step into the step's buffers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable, check_scatter_tree, num_words


@triton.jit
def _scatter_tree_kernel(
    positions,  # in-place [num_tokens] int64
    step_masks,  # out [>= num_tree_reqs, (NUM_WORDS,) W] int64
    query_start_loc,  # in [R+1] int32
    cu_num_logits,  # in [R+1] int32
    idx_mapping,  # in [R] int64, batch row -> row of `depths` and `masks`
    depths,  # in [max_num_reqs, W] int32
    masks,  # in [max_num_reqs, (NUM_WORDS,) W] int64
    step_masks_stride,
    depths_stride,
    masks_stride,
    NUM_ROWS: tl.constexpr,  # W
    NUM_WORDS: tl.constexpr,  # 1, or 2 for more than 64 rows
    PADDED_ROWS: tl.constexpr,
):
    """Grid: (num_tree_reqs,). One program owns one request's rows."""
    req = tl.program_id(0)
    idx = tl.load(idx_mapping + req).to(tl.int64)
    num_rows = tl.load(cu_num_logits + req + 1) - tl.load(cu_num_logits + req)
    root = tl.load(query_start_loc + req + 1).to(tl.int64) - num_rows

    rows = tl.arange(0, PADDED_ROWS)
    known = rows < tl.where(idx >= 0, NUM_ROWS, 0)
    depth = tl.load(depths + idx * depths_stride + rows, mask=known, other=0)
    in_row = masks + idx * masks_stride
    mask = tl.load(in_row + rows, mask=known, other=0)
    # Row 0 (the root) keeps its position and is never written: no order between the
    # read of its position by one thread and the writes of the others is needed.
    tree = known & (rows > 0) & (rows < num_rows)
    base = tl.load(positions + root, mask=num_rows > 0, other=0)
    tl.store(positions + root + rows, base + depth, mask=tree)
    out_row = step_masks + req.to(tl.int64) * step_masks_stride
    tl.store(out_row + rows, mask, mask=known)
    if NUM_WORDS > 1:
        second = tl.load(in_row + NUM_ROWS + rows, mask=known, other=0)
        tl.store(out_row + NUM_ROWS + rows, second, mask=known)


def scatter_tree(
    positions: torch.Tensor,
    step_masks: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    depths: torch.Tensor,
    masks: torch.Tensor,
    num_tree_reqs: int,
) -> None:
    """Turn linear positions of tree rows into tree positions and gather their masks.

    Of each of the first `num_tree_reqs` requests the last ``n = cu[r+1] - cu[r]`` query rows
    are tree rows; row j gets the root row's position + its depth.

    Parameters
    ----------
    positions : torch.Tensor
        ``[num_tokens]`` int64, in place. Linear positions on entry.
    step_masks : torch.Tensor
        ``[>= num_tree_reqs, W]`` int64, out. ``step_masks[r] = masks[idx_mapping[r]]``; for
        W > 64 ``[>= num_tree_reqs, 2, W]``.
    query_start_loc : torch.Tensor
        ``[>= num_tree_reqs + 1]`` int32.
    cu_num_logits : torch.Tensor
        ``[>= num_tree_reqs + 1]`` int32. Cumulated tree rows.
    idx_mapping : torch.Tensor
        ``[>= num_tree_reqs]`` int64 or int32. Batch row -> row of `depths` and `masks`;
        a negative one leaves its request untouched.
    depths : torch.Tensor
        ``[max_num_reqs, W]`` int32. Depth of each row, 0 at the root; W <= 128.
    masks : torch.Tensor
        ``[max_num_reqs, W]`` int64. Ancestor-or-self words; for W > 64 ``[max_num_reqs, 2, W]``,
        words of rows 0..63, then of the others.
    num_tree_reqs : int
        Requests to treat; 0 launches nothing.

    Examples
    --------
    A root at position 10 with two children and one grandchild (depths ``0 1 1 2``):
    positions ``10 11 12 13`` become ``10 11 11 12``.
    """
    arguments = (
        positions, step_masks, query_start_loc, cu_num_logits, idx_mapping, depths, masks,
        num_tree_reqs,
    )  # fmt: skip
    check_scatter_tree(*arguments)
    check_runnable("positions", positions, _scatter_tree_kernel)
    if num_tree_reqs == 0:
        return
    width = depths.shape[1]
    _scatter_tree_kernel[(num_tree_reqs,)](
        positions, step_masks, query_start_loc, cu_num_logits, idx_mapping, depths, masks,
        step_masks.stride(0), depths.stride(0), masks.stride(0),
        NUM_ROWS=width, NUM_WORDS=num_words(width),
        PADDED_ROWS=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
