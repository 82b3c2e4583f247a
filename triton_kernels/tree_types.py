"""Tensors that a choice of trees reads and writes; no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Candidates(NamedTuple):
    """Nodes among which a tree is chosen, parents before children, each a path of ranks.

    ``-1`` stands beyond a candidate's depth.
    """

    columns: torch.Tensor  # [K, U] int32, depth - 1 -> (head, rank) as head * T + rank
    ancestors: torch.Tensor  # [K, U] int32, depth - 1 -> candidate there, the last is itself


class TreeTables(NamedTuple):
    """Trees by request slot, rows as in ``tree_walk`` and ``scatter_tree``."""

    parents: torch.Tensor  # [S, W] int32, row -> parent row
    depths: torch.Tensor  # [S, W] int32, row -> depth
    masks: torch.Tensor  # [S, W] int64, bit j of row i: j is i or its ancestor


class FixedTree(NamedTuple):
    """The tree of requests that do not choose one."""

    slots: torch.Tensor  # [S] int32, not 0: the request in this slot keeps the tree
    columns: torch.Tensor  # [N] int32, node -> head * T + rank
    parents: torch.Tensor  # [W] int32
    depths: torch.Tensor  # [W] int32
    masks: torch.Tensor  # [W] int64
