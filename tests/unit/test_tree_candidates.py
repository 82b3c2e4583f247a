"""Candidates of trees chosen step by step: all that can be needed, and no other."""

import itertools

import numpy as np
import pytest

from vllm_medusa.tree_candidates import (
    candidate_paths,
    candidate_tables,
    head_ranks,
)
from vllm_medusa.tree_paths import parents_first


def all_paths(ranks):
    return [
        path
        for depth in range(1, len(ranks) + 1)
        for path in itertools.product(*map(range, ranks[:depth]))
    ]


@pytest.mark.parametrize(
    ("num_nodes", "ranks", "count"),
    [(63, [10] * 4, 871), (32, [10] * 4, 365), (63, [16] * 5, 2079), (3, [2, 3], 4), (1, [9], 1)],
)
def test_counts(num_nodes, ranks, count):
    assert len(candidate_paths(num_nodes, ranks)) == count


@pytest.mark.parametrize(("num_nodes", "ranks"), [(1, [3, 3]), (7, [4, 4, 4]), (12, [5, 2, 3])])
def test_likeliest_paths_are_candidates_whatever_the_probabilities(num_nodes, ranks):
    candidates = set(candidate_paths(num_nodes, ranks))
    rng = np.random.default_rng(num_nodes)
    for _ in range(200):
        # Few values, so that there are ties; sorted, as ranks are.
        tables = [np.sort(rng.integers(0, 6, count))[::-1] for count in ranks]
        worth = {
            path: np.prod([table[rank] for table, rank in zip(tables, path, strict=False)])
            / 5.0 ** len(path)
            for path in all_paths(ranks)
        }
        ordered = sorted(worth, key=lambda path: (-worth[path], len(path), path))
        assert candidates.issuperset(ordered[:num_nodes])


def test_every_candidate_is_needed_for_some_probabilities():
    """Its ranks and the smaller ones equally likely, others impossible: then it is needed."""
    num_nodes, ranks = 12, [5, 4, 3]
    for needed in candidate_paths(num_nodes, ranks):
        before = [
            path
            for path in all_paths(ranks)
            if len(path) <= len(needed) and all(r <= n for r, n in zip(path, needed, strict=False))
        ]
        assert len(before) <= num_nodes


def test_parents_stand_first_and_tables_follow_them():
    paths = candidate_paths(20, [6] * 3)
    assert parents_first(tuple(paths))
    columns, ancestors = candidate_tables(paths, 3, 8)
    for place, path in enumerate(paths):
        for level in range(3):
            if level < len(path):
                assert paths[ancestors[level, place]] == path[: level + 1]
                assert columns[level, place] == level * 8 + path[level]
            else:
                assert ancestors[level, place] == columns[level, place] == -1


@pytest.mark.parametrize(
    ("num_nodes", "num_heads", "vocab_size", "ranks"),
    [
        (63, 4, 32_000, [32, 10, 10, 10]),
        (63, 1, 32_000, [63]),
        (16, 2, 32_000, [16, 10]),
        (5, 3, 32_000, [5, 5, 5]),
        (63, 4, 4, [4, 4, 4, 4]),
    ],
)
def test_ranks(num_nodes, num_heads, vocab_size, ranks):
    assert head_ranks(num_nodes, num_heads, vocab_size) == ranks
    assert len(candidate_paths(num_nodes, ranks)) >= num_nodes


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="1 heads over 7 tokens fill fewer than 8 nodes"):
        head_ranks(8, 1, 7)
