"""A tree's paths laid out one after another, for code that reads rows as a chain.

vLLM's logits processors (penalties, bad words, thinking budgets, custom ones) take the
rows before a row of the same request as the drafts before it.  In a tree those are not
its ancestors; in a list of its root-to-leaf paths they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_medusa.tree import TokenTree


class ChainRows(NamedTuple):
    """Rows of a batch in which the requests that asked for it are lists of chains."""

    rows: np.ndarray  # [num_chain_rows] int64, row of the batch
    local_pos: np.ndarray  # [num_chain_rows] int32, place within the chain
    kept: np.ndarray  # [num_rows] int64, a row of the batch -> where it first stands in `rows`


def leaf_paths(tree: TokenTree, num_rows: int) -> list[list[int]]:
    """Paths of rows from the root to every leaf of the tree's first ``num_rows`` rows.

    Examples
    --------
    >>> leaf_paths(TokenTree.from_paths([[0], [1], [0, 0]]), 4)
    [[0, 2], [0, 1, 3]]
    """
    leaves = set(range(num_rows)) - set(tree.parents[:num_rows])
    return [tree.path_to(leaf) for leaf in sorted(leaves)]


class PathChains:
    """Chains of every tree that a step can hold: the start-up tree cut to any size.

    Parameters
    ----------
    tree : TokenTree
        W rows, root included.
    """

    def __init__(self, tree: TokenTree):
        width = tree.num_rows
        chains = [
            [row for path in leaf_paths(tree, rows) for row in path] for rows in range(1, width + 1)
        ]
        longest = max(width, *map(len, chains))
        # First index: 0 rows as they are, 1 chains.  Second: rows of the request.
        self._rows = np.zeros((2, width + 1, longest), dtype=np.int64)
        self._local_pos = np.zeros((2, width + 1, longest), dtype=np.int32)
        self._kept = np.zeros((2, width + 1, width), dtype=np.int64)
        self._lengths = np.zeros((2, width + 1), dtype=np.int64)
        self._rows[0] = np.arange(longest)
        self._local_pos[0] = np.arange(longest)
        self._kept[0] = np.arange(width)
        self._lengths[0] = np.arange(width + 1)
        for rows, chain in enumerate(chains, start=1):
            self._rows[1, rows, : len(chain)] = chain
            self._local_pos[1, rows, : len(chain)] = [tree.depths[row] for row in chain]
            self._kept[1, rows, :rows] = [chain.index(row) for row in range(rows)]
            self._lengths[1, rows] = len(chain)

    def lengths(self, num_rows: np.ndarray, chained: np.ndarray) -> np.ndarray:
        """Rows that each request takes, [num_reqs] int64; arguments as in :meth:`expand`."""
        return self._lengths[chained.astype(np.int64), num_rows]

    def expand(self, num_rows: np.ndarray, chained: np.ndarray) -> ChainRows:
        """Lay the rows of a batch out anew.

        Parameters
        ----------
        num_rows : numpy.ndarray
            [num_reqs] integers, rows of each request, one after another in the batch.
        chained : numpy.ndarray
            [num_reqs] bool: lay out as chains; the others stay as they are.

        Returns
        -------
        ChainRows
        """
        kind = chained.astype(np.int64)
        starts = np.cumsum(num_rows) - num_rows
        lengths = self._lengths[kind, num_rows]
        first = np.cumsum(lengths) - lengths
        used = np.arange(self._rows.shape[2]) < lengths[:, None]
        real = np.arange(self._kept.shape[2]) < num_rows[:, None]
        return ChainRows(
            (self._rows[kind, num_rows] + starts[:, None])[used],
            self._local_pos[kind, num_rows][used],
            (self._kept[kind, num_rows] + first[:, None])[real],
        )
