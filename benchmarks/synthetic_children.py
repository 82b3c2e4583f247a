"""Which child of each row is right, by chance: the launcher and the kernel's twin in PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from vllm_medusa.triton_kernels.checks import at_least, check_tensor, require

# Numbers are drawn from 0 .. this - 1.
UNIT = 2**32
# Frequencies were counted or rounded: children may come to this much more than their parent.
SLACK = 1e-6


def child_ranges(tree: Any, frequencies: tuple[float, ...]) -> tuple[list[int], list[int]]:
    """Numbers for which each row is its parent's right child, ``low <= number < high``.

    Parameters
    ----------
    tree : TokenTree
    frequencies : sequence of float
        Share of steps whose path holds each node, root not counted.

    Returns
    -------
    low, high : list of int, [num_rows]
        In units of ``1 / UNIT``; the root's are empty.

    Raises
    ------
    ValueError
        Children that are right more often than their parent.

    Examples
    --------
    >>> from vllm_medusa.tree import TokenTree
    >>> low, high = child_ranges(TokenTree.from_paths([[0], [1], [0, 0]]), (0.5, 0.25, 0.125))
    >>> [round(x / UNIT, 3) for x in low], [round(x / UNIT, 3) for x in high]
    ([0.0, 0.0, 0.5, 0.0], [0.0, 0.5, 0.75, 0.25])
    """
    worth = [1.0, *frequencies]
    low, high, taken = [0], [0], [0.0] * tree.num_rows
    for row, parent in enumerate(tree.parents[1:], start=1):
        share = worth[row] / worth[parent] if worth[parent] > 0 else 0.0
        low.append(round(UNIT * min(1.0, taken[parent])))
        taken[parent] += share
        require(
            taken[parent] <= 1 + SLACK,
            "frequencies",
            f"children of row {parent} that are right in {taken[parent]:.4f} of its cases",
            "at most 1; calibrate the tree again",
        )
        high.append(round(UNIT * min(1.0, taken[parent])))
    return low, high


def _mixed(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser over one more 32-bit word; both int64."""
    state = state ^ (word & 0xFFFFFFFF)
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return state ^ (state >> 16)


def draw_children(
    out_tokens: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cu_rows: torch.Tensor,
    slots: torch.Tensor,
    seeds: torch.Tensor,
    parents: torch.Tensor,
    lowest: torch.Tensor,
    highest: torch.Tensor,
) -> None:
    """Draw every row's right child from the request's seed and slot, the row's position and token.

    A walk reads one row of each position, so what it meets is independent.

    Parameters
    ----------
    out_tokens : torch.Tensor
        ``[num_logits]``, out, like `tokens`: -1 at every node that is not right.
    drawn : torch.Tensor
        ``[num_logits]`` int64, in place: the right child's token where a row has one.
    tokens, positions : torch.Tensor
        ``[num_logits]``, each row's own.
    cu_rows : torch.Tensor
        ``[R + 1]`` int32, first row of each request.
    slots : torch.Tensor
        ``[R]`` int64; rows of a negative one are no request's.
    seeds : torch.Tensor
        ``[max_num_reqs]`` int64.
    parents : torch.Tensor
        ``[max_num_reqs, W]`` int32.
    lowest, highest : torch.Tensor
        ``[W]`` int64, of :func:`child_ranges`.
    """
    num_logits, device = tokens.shape[0], tokens.device
    rows, width = [at_least(num_logits)], [parents.shape[1]]
    for name, tensor, shape, dtype in (
        ("out_tokens", out_tokens, [num_logits], tokens.dtype),
        ("drawn", drawn, rows, torch.int64),
        ("positions", positions, rows, torch.int64),
        ("cu_rows", cu_rows, [at_least(slots.shape[0] + 1)], torch.int32),
        ("slots", slots, [None], (torch.int64, torch.int32)),
        ("seeds", seeds, [parents.shape[0]], torch.int64),
        ("parents", parents, [None, None], torch.int32),
        ("lowest", lowest, width, torch.int64),
        ("highest", highest, width, torch.int64),
    ):
        check_tensor(name, tensor, shape=shape, dtype=dtype, device=device)
    arguments = (
        out_tokens, drawn, tokens, positions, cu_rows, slots, seeds, parents, lowest, highest,
    )  # fmt: skip
    if device.type == "cuda":
        import synthetic_kernel

        synthetic_kernel.launch(slots.shape[0], parents, arguments)
    else:
        reference(*arguments)


def reference(
    out_tokens, drawn, tokens, positions, cu_rows, slots, seeds, parents, lowest, highest
) -> None:  # fmt: skip
    """The kernel in PyTorch."""
    starts = cu_rows[: slots.shape[0] + 1].long()
    counts = starts[1:] - starts[:-1]
    owner = torch.repeat_interleave(slots.long(), counts)
    start = torch.repeat_interleave(starts[:-1], counts)
    rows = torch.arange(start.shape[0], device=tokens.device) + starts[0]
    place = rows - start
    node = (place > 0) & (owner >= 0)
    slot = owner.clamp(min=0)
    parent = start + parents[slot, place].long().clamp(min=0)
    token = tokens[rows].long()
    state = torch.zeros_like(token)
    for word in (seeds[slot], seeds[slot] >> 32, slot, positions[parent], tokens[parent].long()):
        state = _mixed(state, word)
    right = node & (token >= 0) & (lowest[place] <= state) & (state < highest[place])
    drawn[parent[right]] = token[right]
    out_tokens[rows] = token.where(right | (place == 0), -1).to(out_tokens.dtype)
