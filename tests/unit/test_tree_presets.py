"""The nine published lists, checked against their published shape."""

from __future__ import annotations

import pytest

from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_presets import PUBLISHED_PATHS, published_paths

# name -> (nodes at depth 1, 2, .., leaves), counted on the published lists
SHAPES = {
    "mc_sim_7b_63": ((10, 28, 23, 2), 42),
    "vicuna_7b_stage2": ((10, 23, 23, 7), 42),
    "vicuna_7b_stage1_ablation": ((10, 21, 25, 7), 42),
    "vicuna_7b_stage1": ((10, 32, 20, 1), 44),
    "vicuna_13b_stage2": ((10, 19, 25, 9), 42),
    "vicuna_13b_stage1": ((10, 29, 23, 1), 44),
    "vicuna_33b_stage2": ((10, 24, 24, 5), 43),
    "vicuna_33b_stage1": ((10, 34, 19), 46),
    "zephyr_stage2": ((10, 27, 23, 3), 44),
}


def test_names():
    assert set(PUBLISHED_PATHS) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name):
    tree = TokenTree.preset(name)
    depths, leaves = SHAPES[name]
    assert tree.num_nodes == 63 and tree.num_rows == 64
    assert tree.nodes_per_depth == depths
    assert tree.num_rows - len(set(tree.parents[1:])) == leaves
    assert tree.max_rank == 9
    assert tree.paths == published_paths(name), "the published order is best-first and kept"


@pytest.mark.parametrize("name", SHAPES)
def test_every_prefix_is_a_tree(name):
    paths = published_paths(name)
    for num_nodes in range(1, 64):
        prefix = set(paths[:num_nodes])
        assert len(prefix) == num_nodes
        assert all(len(path) == 1 or path[:-1] in prefix for path in prefix)
        assert TokenTree.preset(name).cut(num_nodes).paths == paths[:num_nodes]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'vicuna'.*mc_sim_7b_63.*zephyr_stage2"):
        TokenTree.preset("vicuna")
