"""A batch's rows laid out as chains: every row's history is its ancestors, in order."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_medusa.path_chains import PathChains, leaf_paths
from vllm_medusa.tree import TokenTree

TREES = {
    "preset": TokenTree.preset("mc_sim_7b_63"),
    "wide": TokenTree.from_widths([4, 2, 1]),
    "chain": TokenTree.from_paths([[0], [0, 0], [0, 0, 0]]),
    "one node": TokenTree.from_paths([[0]]),
}


def ancestors(tree: TokenTree, row: int) -> list[int]:
    path = [row]
    while tree.parents[path[0]] >= 0:
        path.insert(0, tree.parents[path[0]])
    return path


@pytest.mark.parametrize("name", TREES)
def test_history_of_a_row_is_its_path(name):
    tree = TREES[name]
    rng = np.random.default_rng(0)
    chains = PathChains(tree)
    for _ in range(50):
        num_rows = rng.integers(1, tree.num_rows + 1, size=rng.integers(1, 9))
        chained = rng.random(len(num_rows)) < 0.6
        rows, local_pos, kept = chains.expand(num_rows, chained)
        assert len(rows) == chains.lengths(num_rows, chained).sum()
        starts = np.cumsum(num_rows) - num_rows
        flat = 0
        for start, count, is_chained in zip(starts, num_rows, chained, strict=True):
            for row in range(count):
                place = kept[flat]
                history = rows[place - local_pos[place] : place + 1] - start
                path = ancestors(tree, row) if is_chained else list(range(row + 1))
                assert history.tolist() == path
                flat += 1
        assert flat == len(kept)


def test_a_chain_is_its_only_path():
    assert leaf_paths(TREES["chain"], 4) == [[0, 1, 2, 3]]
    assert leaf_paths(TREES["chain"], 1) == [[0]]


def test_chains_take_less_than_three_rows_a_node():
    """The rows that processors work on, for the largest published tree."""
    chains = PathChains(TREES["preset"])
    all_rows = np.array([64])
    assert chains.lengths(all_rows, np.array([True])) < 3 * all_rows
    assert chains.lengths(all_rows, np.array([False])) == all_rows
