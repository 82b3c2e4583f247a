"""Best-first search equals brute force, and its budgets are nested."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_medusa.tree import MAX_NODES, TokenTree

# Sums of at most 127 products of at most 6 doubles below 1: rounding stays far below.
FLOAT_TOLERANCE = 1e-12


def accuracy_tables(max_heads: int, max_ranks: int) -> st.SearchStrategy[list[list[float]]]:
    """Rows in any order of size, each summing to at most 0.9."""
    accuracy = st.integers(0, 90 // max_ranks).map(lambda percent: percent / 100)
    row = st.lists(accuracy, min_size=1, max_size=max_ranks)
    return st.lists(row, min_size=1, max_size=max_heads)


def all_paths(table):
    return [
        path
        for depth in range(1, len(table) + 1)
        for path in itertools.product(*(range(len(row)) for row in table[:depth]))
    ]


def is_tree(paths):
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


# 12 or 14 nodes at most: up to 3432 subsets to try per example.
@settings(max_examples=40)
@given(st.one_of(accuracy_tables(2, 3), accuracy_tables(3, 2)), st.data())
def test_equals_brute_force(table, data):
    nodes = all_paths(table)
    num_nodes = data.draw(st.integers(1, len(nodes)))
    tree = TokenTree.best_first(table, num_nodes)
    assert tree.num_nodes == num_nodes
    best = max(
        sum(math.prod(table[d][rank] for d, rank in enumerate(path)) for path in subset)
        for subset in itertools.combinations(nodes, num_nodes)
        if is_tree(set(subset))
    )
    assert abs(tree.expected_tokens(table) - 1 - best) <= FLOAT_TOLERANCE


@given(accuracy_tables(4, 5), st.data())
def test_best_first_order_and_nested_budgets(table, data):
    limit = min(MAX_NODES, len(all_paths(table)))
    num_nodes = data.draw(st.integers(1, limit))
    tree = TokenTree.best_first(table, num_nodes)
    values = [math.prod(table[d][rank] for d, rank in enumerate(path)) for path in tree.paths]
    assert all(a >= b - FLOAT_TOLERANCE for a, b in itertools.pairwise(values))
    assert TokenTree.best_first(table, limit).cut(num_nodes) == tree


def test_published_accuracies():
    # Final top-1..5 training accuracies of the author's 7B heads (1 and 2), as
    # differences. By hand: .560, .560 * .316 = .177, then .112, .088, ..
    table = [[0.560, 0.112, 0.055, 0.033, 0.020], [0.316, 0.108, 0.061, 0.043, 0.034]]
    tree = TokenTree.best_first(table, 4)
    assert tree.paths == ((0,), (0, 0), (1,), (0, 1))
    expected = 1 + 0.560 * (1 + 0.316 + 0.108) + 0.112
    assert abs(tree.expected_tokens(table) - expected) <= FLOAT_TOLERANCE


def test_ranks_that_are_not_sorted():
    # Values: (1) .5, (1, 1) .15, (0) .11, (1, 0) .1
    tree = TokenTree.best_first([[0.11, 0.5], [0.2, 0.3]], 3)
    assert tree.paths == ((1,), (1, 1), (0,))


@pytest.mark.parametrize(
    ("table", "num_nodes", "words"),
    [
        ([[0.5]], 2, r"found 2, expected 1..1"),
        ([[0.1] * 9] * 3, 128, r"found 128, expected 1..127"),
        ([[0.5]], 0, r"found 0"),
        ([], 1, r"one non-empty row"),
        ([[0.5], []], 1, r"one non-empty row"),
        ([[0.5, -0.1]], 1, r"head 1 rank 1 is -0.1"),
        ([[0.5], [float("nan")]], 1, r"head 2 rank 0 is nan"),
        ([[0.56, 0.672, 0.727]], 1, r"head 1 sums to 1.9590.*not the cumulative"),
    ],
)
def test_refusals(table, num_nodes, words):
    with pytest.raises(ValueError, match=words):
        TokenTree.best_first(table, num_nodes)


def test_expected_tokens_needs_the_ranks():
    with pytest.raises(ValueError, match=r"path \[0, 1\] uses rank 1 of head 2"):
        TokenTree.from_paths([[0], [0, 1]]).expected_tokens([[0.5], [0.5]])
    with pytest.raises(ValueError, match=r"path \[0, 0\] uses rank 0 of head 2"):
        TokenTree.from_paths([[0], [0, 0]]).expected_tokens([[0.5]])
