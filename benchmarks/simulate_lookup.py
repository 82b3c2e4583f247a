"""Tokens per step of chosen trees into which prompt lookup is merged, with prices held out.

The price of a continuation's tokens is how often they were right, by the tokens that matched.
Counted on the answers that are simulated it flatters itself, so it is counted on every other
answer and applied to those between, and the other way round; the served prices stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_medusa.prompt_lookup import SHARES, chain_costs
from vllm_medusa.training.calibrate import HeadRanks
from vllm_medusa.training.simulate import candidates_of
from vllm_medusa.tree_candidates import (
    candidate_paths,
    candidate_tables,
    head_ranks,
    head_weights,
)
from vllm_medusa.triton_kernels.lookup_types import MAX_MATCH
from vllm_medusa.triton_kernels.reference_lookup import longest_match

HELD_OUT, SERVED = "chosen, lookup, held-out prices", "chosen, lookup, served prices"
# A match length that was met less often in the other half keeps the served share.
FEWEST = 20
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Continuations:
    """What the histories proposed, row by row as in :class:`HeadRanks`.

    Attributes
    ----------
    matches : numpy.ndarray, [rows] int64
        Newest tokens that were found before; 0: none.
    right : numpy.ndarray, [rows] int64
        First tokens of the continuation that the answer has too.
    has_next : numpy.ndarray, [rows] bool
        Whether the answer goes on behind the row.
    length : int
        Tokens of a continuation.
    """

    matches: np.ndarray
    right: np.ndarray
    has_next: np.ndarray
    length: int


def find_continuations(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], length: int
) -> Continuations:
    """Search as the served kernel's twin does, behind every token of every answer.

    Parameters
    ----------
    pairs : sequence of (prompt ids, answer ids)
    length : int
        Tokens of a continuation.

    Examples
    --------
    >>> found = find_continuations([([5, 6, 7], [5, 6, 8])], 4)
    >>> found.matches.tolist(), found.right.tolist(), found.has_next.tolist()
    ([1, 2, 0], [1, 0, 0], [True, True, False])
    """
    matches, right, has_next = [], [], []
    for prompt, answer in pairs:
        tokens = torch.tensor([*prompt, *answer])
        for row in range(len(answer)):
            known = tokens[: len(prompt) + row + 1]
            match, first = longest_match(known)
            wanted, held = answer[row + 1 : row + 1 + length], 0
            period = len(known) - first
            while match and held < len(wanted) and known[first + held % period] == wanted[held]:
                held += 1
            matches.append(match)
            right.append(held)
            has_next.append(row + 1 < len(answer))
    return Continuations(np.array(matches), np.array(right), np.array(has_next), length)


def count_shares(found: Continuations, rows: np.ndarray) -> tuple[float, ...]:
    """How often the next token was right behind a match of 1, 2, .. tokens.

    Parameters
    ----------
    found : Continuations
    rows : numpy.ndarray, [all rows] bool
        Which are counted.
    """
    shares = []
    for match in range(1, MAX_MATCH + 1):
        own = rows & found.has_next & (found.matches == match)
        counted = own.sum() >= FEWEST
        share = (found.right[own] > 0).mean() if counted else SHARES[match - 1]
        shares.append(float(np.clip(share, 0.001, 0.999)))
    return tuple(shares)


def head_costs(ranks: HeadRanks, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Prices of the heads' likeliest paths and of the right ones, as served.

    Returns
    -------
    least : numpy.ndarray, [rows, num_nodes + num_heads] float32
        Ascending.
    right : numpy.ndarray, [rows, num_heads] float32
        Of the right node of each depth; infinite where it is no candidate.
    """
    _, num_heads, num_ranks = ranks.log_probs.shape
    paths = candidate_paths(num_nodes, head_ranks(num_nodes, num_heads, num_ranks))
    columns, _ = candidate_tables(paths, num_heads, num_ranks)
    places = candidates_of(ranks.ranks, paths)
    weights = np.array(head_weights(num_heads), np.float32)
    least, right = [], []
    for start in range(0, len(places), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        flat = -ranks.log_probs[rows] * weights[:, None]
        flat = flat.reshape(-1, num_heads * num_ranks)
        costs = np.zeros((len(flat), len(paths)), np.float32)
        for level in columns:
            costs += np.where(level >= 0, flat[:, level], np.float32(0))
        own = np.take_along_axis(costs, np.maximum(places[rows], 0), 1)
        right.append(np.where(places[rows] >= 0, own, np.inf))
        least.append(np.sort(costs, 1)[:, : num_nodes + num_heads])
    return np.concatenate(least), np.concatenate(right)


def merge(
    least: np.ndarray, right: np.ndarray, chain: np.ndarray, held: np.ndarray, num_nodes: int
) -> np.ndarray:
    """Tokens accepted of trees of the heads' and the history's cheapest nodes, [rows] int64.

    Where both hold a right node it is one, at the lower price.  Wrong nodes that both hold count
    twice here, since the heads' wrong tokens are not known: the result is a little too low.

    Parameters
    ----------
    least, right : numpy.ndarray
        From :func:`head_costs`.
    chain : numpy.ndarray, [rows, length] float32
        Price of the continuation's node of each depth.
    held : numpy.ndarray, [rows] int64
        Right tokens of the continuation.
    num_nodes : int
    """
    depths = np.arange(1, chain.shape[1] + 1)
    is_right = depths <= held[:, None]
    own = np.full_like(chain, np.inf)
    own[:, : right.shape[1]] = right[:, : chain.shape[1]]
    path = np.minimum(own, np.where(is_right, chain, np.inf))
    both = is_right & np.isfinite(own)
    # The dearer of two prices of one node is nobody's: as many lie below the limit too many.
    dearer = np.where(both, np.maximum(own, chain), np.inf)
    prices = np.sort(np.concatenate([least, chain], 1), 1)
    doubles = np.sort(dearer, 1)
    limit = np.full(len(chain), np.inf)
    for place in range(prices.shape[1] - 1, num_nodes - 2, -1):
        price = prices[:, place]
        distinct = place + 1 - (doubles <= price[:, None]).sum(1)
        limit = np.where(distinct >= num_nodes, price, limit)
    inside = path <= limit[:, None]
    # A path's prices never fall, so that its nodes inside are its first ones.
    return np.cumprod(inside, 1).sum(1)


def merged_depths(ranks: HeadRanks, found: Continuations, num_nodes: int) -> dict[str, np.ndarray]:
    """Tokens that a step at each row accepts, with held-out and with served prices."""
    least, right = head_costs(ranks, num_nodes)
    question = np.repeat(np.arange(len(ranks.offsets) - 1), np.diff(ranks.offsets))
    odd = question % 2 == 1
    served = chain_costs(found.length)[found.matches]
    halves = [
        chain_costs(found.length, count_shares(found, rows))[found.matches] for rows in (odd, ~odd)
    ]
    held_out = np.where(odd[:, None], halves[1], halves[0])
    return {
        name: merge(least, right, chain, found.right, num_nodes)
        for name, chain in ((HELD_OUT, held_out), (SERVED, served))
    }
