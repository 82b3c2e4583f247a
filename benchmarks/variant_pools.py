"""What sequential heads think of every node of a fixed tree, row by row of some answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vllm_medusa.heads import MedusaHeads
from vllm_medusa.kernels import DrawNoise
from vllm_medusa.sequential_draft import SequentialDrafter
from vllm_medusa.sequential_heads import SequentialHeads
from vllm_medusa.training.calibrate import MISSED
from vllm_medusa.training.hidden_states import HiddenStateSet
from vllm_medusa.training.simulate import Path_, candidates_of, path_costs, pool_places
from vllm_medusa.tree import TokenTree

# Requests that the drafter gives whole trees at once.
_AT_ONCE = 8


@torch.inference_mode()
def score_pool(
    heads: MedusaHeads,
    paths: tuple[Path_, ...],
    data: HiddenStateSet,
    # [vocab, hidden] each
    embeddings: Tensor,
    lm_head: Tensor | None = None,
    noise_of: Callable[[slice], DrawNoise] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draft the tree at every row, as it is served.

    Parameters
    ----------
    heads : MedusaHeads
    paths : tuple of tuple of int
        The tree, parents before their children.
    data : HiddenStateSet
    embeddings, lm_head : torch.Tensor
        The base's; no lm_head for heads that have their own.
    noise_of : callable, optional
        Noise of the draws behind some rows, each a request of its own.

    Returns
    -------
    tokens, log_probs : numpy.ndarray, [rows, nodes] int64 and float32
        Log probabilities behind the node's parent.
    """
    sequential = SequentialHeads(heads.to_weights(), embeddings.device)
    drafter, found = SequentialDrafter(sequential, TokenTree.from_paths(paths), _AT_ONCE), []
    product = None if lm_head is None else lambda states: functional.linear(states, lm_head)
    for start in range(0, data.num_rows, _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        tables = drafter.score(
            data.hidden[rows], data.labels[rows, 0].long(), embeddings, product,
            None if noise_of is None else noise_of(rows),
        )  # fmt: skip
        found.append([table.flatten(1)[:, : len(paths)].clone() for table in tables])
    tokens, log_probs = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return tokens, log_probs


def places_in_pool(
    heads: MedusaHeads,
    paths: tuple[Path_, ...],
    data: HiddenStateSet,
    # [rows, num_heads]
    ranks: np.ndarray,
    # [vocab, hidden] each
    embeddings: Tensor,
    lm_head: Tensor,
) -> np.ndarray:
    """Draft the tree at every row, as it is served, and place its right nodes."""
    _, log_probs = score_pool(heads, paths, data, embeddings, lm_head)
    return pool_places(ranks, log_probs, paths)


def ranks_in_pool(
    # [rows, nodes] int64
    tokens: np.ndarray,
    # [rows, num_heads] integers, negative where there is none
    labels: np.ndarray,
    # parents before their children
    paths: Sequence[Path_],
) -> np.ndarray:
    """Rank of every right token behind the right path, [rows, num_heads] int64.

    MISSED from the first one on that the tree does not hold.

    Examples
    --------
    >>> ranks_in_pool(np.array([[5, 7, 8]]), np.array([[5, 8]]), [(0,), (0, 0), (0, 1)]).tolist()
    [[0, 1]]
    """
    index = {path: node for node, path in enumerate(paths)}
    parents = np.array([index.get(path[:-1], -1) for path in paths])
    last_ranks = np.array([path[-1] for path in paths])
    ranks = np.full(labels.shape, MISSED, np.int64)
    # The right node of the depth before; -1 is the root, and no node's parent is -2.
    above = np.full(len(tokens), -1)
    for depth in range(labels.shape[1]):
        hits = (tokens == labels[:, depth, None]) & (parents == above[:, None])
        hits &= labels[:, depth, None] >= 0
        is_found, node = hits.any(1), hits.argmax(1)
        ranks[:, depth] = np.where(is_found, last_ranks[node], MISSED)
        above = np.where(is_found, node, -2)
    return ranks


def pool_costs(
    # [rows, num_heads] int, MISSED where wrong
    ranks: np.ndarray,
    # [rows, nodes] float32, log probability of every node behind its parent
    log_probs: np.ndarray,
    # parents before their children
    paths: Sequence[Path_],
) -> tuple[np.ndarray, np.ndarray]:
    """Prices of the tree's nodes and of the right ones among them, as served.

    Returns
    -------
    least : numpy.ndarray, [rows, nodes] float32
        Ascending.
    right : numpy.ndarray, [rows, num_heads] float32
        Of the right node of each depth; infinite where the tree has none.

    Examples
    --------
    >>> log_probs = np.log(np.array([[0.5, 0.5, 0.125]], np.float32))
    >>> prices = pool_costs(np.array([[1, -1]]), log_probs, [(0,), (0, 0), (1,)])
    >>> [np.exp(-part).round(3).tolist() for part in prices]
    [[[0.5, 0.25, 0.125]], [[0.125, 0.0]]]
    """
    costs = path_costs(log_probs, paths)
    nodes = candidates_of(ranks, paths)
    own = np.take_along_axis(costs, np.maximum(nodes, 0), 1)
    return np.sort(costs, 1), np.where(nodes >= 0, own, np.inf)
