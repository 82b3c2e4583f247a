"""Nodes that the likeliest tree of a size can have, whatever the probabilities are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_medusa.tree_paths import TreePath

# Ranks that a tree chosen step by step may use, of the first head and of the later ones. An
# unsure first head wants many: with 16 instead of 32, 63 nodes lose 2 % of the tokens per step
# of SmolLM2's heads; later heads lose nothing from 10 on.
FIRST_RANKS, LATER_RANKS = 32, 10
# Factor of the later heads' log probabilities. Heads are not quite independent: behind a first
# token that was not the likeliest, what later heads expect comes less often than they say.
LATER_WEIGHT = 1.3
# Errors of heads' logits over a temperature, in units of the sampler's noise (their log
# probabilities are those of the noisy sums divided by it).
NOISE_SPREAD = 2.0


def candidate_paths(num_nodes: int, ranks: Sequence[int]) -> list[TreePath]:
    """Every path that can be among the ``num_nodes`` likeliest, parents first.

    Heads are independent, so a path is as likely as the product of its heads' probabilities.
    Any other path that is no longer and has no larger rank is at least as likely; a path with
    ``num_nodes`` of those before it is never needed.  Shorter paths stand first, then those of
    lower ranks, so that these paths stand before it here too.

    Parameters
    ----------
    num_nodes : int
        Nodes of the tree.
    ranks : sequence of int
        Ranks that each head supplies.

    Examples
    --------
    Three nodes: (0, 2) has (0), (0, 0) and (0, 1) before it, (1, 0) has (0), (1) and (0, 0).

    >>> candidate_paths(3, [2, 3])
    [(0,), (1,), (0, 0), (0, 1)]
    """
    found: list[TreePath] = []

    def grow(path: TreePath, num_beside: int, num_before: int) -> None:
        if len(path) == len(ranks):
            return
        for rank in range(ranks[len(path)]):
            # Paths of no larger ranks: as long as this one, and in all.
            beside = num_beside * (rank + 1)
            if num_before + beside > num_nodes:
                break
            found.append((*path, rank))
            grow(found[-1], beside, num_before + beside)

    grow((), 1, 0)
    return sorted(found, key=lambda path: (len(path), path))


def head_ranks(num_nodes: int, num_heads: int, vocab_size: int) -> list[int]:
    """Ranks that each head supplies to trees of ``num_nodes`` nodes.

    :data:`FIRST_RANKS` and :data:`LATER_RANKS`, or more where so few do not make as many
    candidates.

    Raises
    ------
    ValueError
        When the heads' whole vocabulary does not.
    """
    most = min(num_nodes, vocab_size)
    ranks = [min(FIRST_RANKS, most), *[min(LATER_RANKS, most)] * (num_heads - 1)]
    while len(candidate_paths(num_nodes, ranks)) < num_nodes:
        if min(ranks) == most:
            raise ValueError(
                f"tree='dynamic': {num_heads} heads over {vocab_size} tokens fill fewer than "
                f"{num_nodes} nodes; lower num_speculative_tokens"
            )
        ranks = [min(rank + 1, most) for rank in ranks]
    return ranks


def head_weights(num_heads: int) -> list[float]:
    """Factor of each head's log probabilities."""
    return [1.0, *[LATER_WEIGHT] * (num_heads - 1)]


def candidate_tables(
    paths: Sequence[TreePath], num_heads: int, num_top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates as the kernel that chooses among them reads them.

    Parameters
    ----------
    paths : sequence of TreePath
        From :func:`candidate_paths`.
    num_heads, num_top : int
        Shape of the heads' tokens.

    Returns
    -------
    columns, ancestors : numpy.ndarray, [num_heads, num_paths] int32
        Per depth: column (head * num_top + rank) of a path's node there, and the path that ends
        there; -1 beyond the path.

    Examples
    --------
    >>> columns, ancestors = candidate_tables([(0,), (1,), (1, 0)], 2, 3)
    >>> columns.tolist(), ancestors.tolist()
    ([[0, 1, 1], [-1, -1, 3]], [[0, 1, 1], [-1, -1, 2]])
    """
    places = {path: place for place, path in enumerate(paths)}
    columns = np.full((num_heads, len(paths)), -1, dtype=np.int32)
    ancestors = np.full_like(columns, -1)
    for place, path in enumerate(paths):
        for level, rank in enumerate(path):
            columns[level, place] = level * num_top + rank
            ancestors[level, place] = places[path[: level + 1]]
    return columns, ancestors
