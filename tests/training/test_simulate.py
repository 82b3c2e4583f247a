"""Calibration divisors, tree search, and the simulation against a plain step-by-step one."""

import itertools

import numpy as np
import pytest
import torch

from vllm_medusa.training.calibrate import (
    MISSED,
    HeadRanks,
    joint_best_first,
    rank_labels,
    search_tree,
)
from vllm_medusa.training.hidden_states import HiddenStateSet
from vllm_medusa.training.simulate import (
    accepted_depths,
    accepted_shares,
    chosen_places,
    per_conversation,
    pool_places,
    simulate_budgets,
    simulate_chosen,
    visited_rows,
)
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.tree import TokenTree

TREE = ((0,), (0, 0), (1,), (0, 1), (0, 0, 0), (2,), (1, 0))


def _answers(seed: int, count: int = 30, vocab: int = 5, heads: int = 3):
    """Answers with a made-up head: its guesses at each row are random token orders."""
    rng = np.random.default_rng(seed)
    answers = [rng.integers(0, vocab, rng.integers(1, 20)) for _ in range(count)]
    # guesses[i][row, head] is a permutation of the vocabulary, best first
    guesses = [
        np.stack([[rng.permutation(vocab) for _ in range(heads)] for _ in range(len(a))])
        for a in answers
    ]
    ranks, labels = [], []
    for answer, guess in zip(answers, guesses, strict=True):
        for row in range(len(answer)):
            line = [MISSED] * heads
            for k in range(1, heads + 1):
                if row + k < len(answer):
                    line[k - 1] = int(np.flatnonzero(guess[row, k - 1] == answer[row + k])[0])
            ranks.append(line)
            labels.append([row + k < len(answer) for k in range(1, heads + 1)])
    offsets = np.cumsum([0, *map(len, answers)])
    return answers, guesses, HeadRanks(np.array(ranks), np.array(labels), offsets, vocab)


def _plain_decode(answer, guess, paths):
    """Steps of a server that drafts tokens, compares them, and emits the bonus token."""
    emitted, steps = 1, 0  # the prompt gives the first token
    while emitted < len(answer):
        newest = emitted - 1
        drafts = {path: [guess[newest, d][r] for d, r in enumerate(path)] for path in paths}
        accepted = max(
            (len(path) for path, tokens in drafts.items()
             if list(answer[emitted : emitted + len(path)]) == tokens),
            default=0,
        )  # fmt: skip
        emitted = min(emitted + accepted + 1, len(answer))
        steps += 1
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_simulation_equals_plain_decoding(seed):
    answers, guesses, ranks = _answers(seed)
    counts = per_conversation(ranks.ranks, ranks.offsets, TREE)
    for answer, guess, count in zip(answers, guesses, counts, strict=True):
        assert count.steps == _plain_decode(answer, guess, TREE)
        assert count.tokens == len(answer) - 1
    total = visited_rows(accepted_depths(ranks.ranks, TREE), ranks.offsets)[1]
    assert total.steps == sum(count.steps for count in counts)
    assert total.tokens == sum(count.tokens for count in counts)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_nodes", [1, 6, 13])
def test_simulation_of_chosen_trees_equals_plain_decoding(seed, num_nodes):
    """Each step decodes with the tree that the host's search finds for its probabilities."""
    answers, guesses, ranks = _answers(seed, count=12)
    rng = np.random.default_rng(seed)
    # Eighths, whose sums are exact in any order, and few, so that there are ties.
    log_probs = -np.sort(rng.integers(1, 20, (len(ranks.ranks), 3, 5)) / np.float32(8), axis=-1)
    nodes = [p for d in (1, 2, 3) for p in itertools.product(range(5), repeat=d)]

    def tree(row):
        cost = {path: -sum(log_probs[row, d, r] for d, r in enumerate(path)) for path in nodes}
        return sorted(nodes, key=lambda path: (cost[path], len(path), path))[:num_nodes]

    steps = 0
    for answer, guess, start in zip(answers, guesses, ranks.offsets, strict=False):
        newest = 0
        while newest < len(answer) - 1:
            right = [
                path for path in tree(start + newest)
                if list(answer[newest + 1 : newest + 1 + len(path)])
                == [guess[newest, d][r] for d, r in enumerate(path)]
            ]  # fmt: skip
            newest += max(map(len, right), default=0) + 1
            steps += 1
    found = simulate_chosen(ranks.ranks, log_probs, ranks.offsets, (num_nodes, 20), (1, 1, 1))
    assert found[num_nodes].steps == steps
    assert found[20].steps <= steps


def test_places_of_paths_that_are_not_in_the_tree():
    log_probs = np.log(np.array([[[0.6, 0.3], [0.1, 0.8]]] * 3, np.float32))
    # Missed; right behind a miss; beyond the nodes.
    ranks = np.array([[MISSED, 0], [0, MISSED], [1, 0]])
    assert chosen_places(ranks, log_probs, 4, (1, 1)).tolist() == [[4, 4], [0, 4], [2, 4]]
    # (1) at 0.3 is now before (0, 1), at 0.6 times the fourth power of 0.8.
    assert chosen_places(np.array([[1, 0]]), log_probs[:1], 4, (1, 4)).tolist() == [[1, 4]]


def test_depths_by_hand():
    ranks = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [0, MISSED, 0]])
    assert accepted_depths(ranks, TREE).tolist() == [3, 2, 2, 1, 0, 1]


def test_perfect_heads_take_whole_path_and_bonus():
    ranks = np.zeros((9, 3), int)
    chain = ((0,), (0, 0), (0, 0, 0))
    visited, count = visited_rows(accepted_depths(ranks, chain), np.array([0, 9]))
    assert visited.tolist() == [0, 4]
    assert (count.steps, count.tokens) == (2, 8)


def test_one_token_answers_need_no_step():
    _, count = visited_rows(np.zeros(2, int), np.array([0, 1, 2]))
    assert (count.steps, count.tokens, count.tokens_per_step) == (0, 0, 0.0)


def test_budgets_never_lose_by_more_nodes():
    _, _, ranks = _answers(1, count=80)
    tree = search_tree(ranks, num_nodes=32)
    steps = [count.steps for count in simulate_budgets(ranks.ranks, ranks.offsets, tree.paths)
             .values()]  # fmt: skip
    assert len(steps) == 4
    assert steps == sorted(steps, reverse=True)


def test_shares_of_accepted_nodes_add_up_to_the_tokens():
    _, _, ranks = _answers(3, count=50)
    shares = dict(zip(TREE, accepted_shares(ranks.ranks, ranks.offsets, TREE), strict=True))
    rows, count = visited_rows(accepted_depths(ranks.ranks, TREE), ranks.offsets)
    assert all(shares[path] <= shares.get(path[:-1], 1.0) for path in TREE)
    assert 1 + sum(shares.values()) == pytest.approx(count.tokens_per_step)
    assert len(rows) == count.steps


def test_each_head_is_divided_by_its_own_labels():
    ranks = np.array([[0, 1], [0, MISSED], [1, 0], [0, MISSED]])
    has_label = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)
    found = HeadRanks(ranks, has_label, np.array([0, 4]), 2).accuracies()
    # Head 2 has three labels, not four.
    np.testing.assert_array_equal(found, [[3 / 4, 1 / 4], [1 / 3, 1 / 3]])


def test_ranks_from_heads_equal_sorting():
    generator = torch.Generator().manual_seed(0)
    heads = TrainableHeads(2, 1, 6)
    torch.nn.init.normal_(heads.weight, generator=generator)
    weight = torch.randn(11, 6, generator=generator)
    hidden = torch.randn(10, 6, generator=generator)
    labels = torch.randint(0, 11, (10, 3), generator=generator)
    labels[-1, 2] = -100
    data = HiddenStateSet(hidden, labels, np.array([0, 10]))
    found = rank_labels(heads, data, weight, max_rank=4, batch_rows=3, with_log_probs=True)
    with torch.no_grad():
        order = (heads(hidden) @ weight.T).argsort(dim=-1, descending=True)
    for row in range(10):
        for k in range(2):
            place = (order[k, row] == labels[row, k + 1]).nonzero()
            expected = int(place) if len(place) and int(place) < 4 else MISSED
            assert found.ranks[row, k] == expected
    scores = (heads(hidden) @ weight.T).log_softmax(-1).sort(-1, descending=True).values
    np.testing.assert_allclose(
        found.log_probs, scores.transpose(0, 1)[:, :, :4].detach(), rtol=1e-5, atol=1e-6
    )
    assert found.has_label.sum() == 19


def test_joint_search_sees_dependence_that_products_miss():
    # Heads are right together or not at all: (1, 1) happens, (0, 1) never does.
    ranks = np.array([[0, 0]] * 5 + [[1, 1]] * 4 + [[MISSED, MISSED]])
    assert [path for path, _ in joint_best_first(ranks, 4)] == [(0,), (0, 0), (1,), (1, 1)]


def test_search_returns_parents_first():
    _, _, ranks = _answers(2, count=60)
    tree = search_tree(ranks, num_nodes=40)
    assert len(tree.paths) == 40
    for i, path in enumerate(tree.paths):
        assert len(path) == 1 or path[:-1] in tree.paths[:i]
    assert list(tree.frequencies) == sorted(tree.frequencies, reverse=True)


def _trees(depth, width, size):
    """Every tree of ``size`` nodes with at most ``width`` children a node."""
    nodes = [p for d in range(1, depth + 1) for p in itertools.product(range(width), repeat=d)]
    for chosen in itertools.combinations(nodes, size):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            yield chosen


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_joint_search_is_optimal_against_all_trees(size):
    rng = np.random.default_rng(size)
    ranks = rng.choice([0, 0, 1, MISSED], (60, 3))
    found = joint_best_first(ranks, size)
    best = max(accepted_depths(ranks, tree).sum() for tree in _trees(3, 2, size))
    assert accepted_depths(ranks, [path for path, _ in found]).sum() == best
    # Expected tokens a step are one plus the nodes' frequencies.
    assert sum(value for _, value in found) == pytest.approx(best / 60)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_product_search_is_optimal_against_all_trees(size):
    table = np.sort(np.random.default_rng(size).dirichlet([1, 1, 1], 3)[:, :2])[:, ::-1].tolist()
    found = TokenTree.best_first(table, size)
    best = max(TokenTree.from_paths(t).expected_tokens(table) for t in _trees(3, 2, size))
    assert found.expected_tokens(table) == pytest.approx(best)
    assert TokenTree.best_first(table, 5).paths[:size] == found.paths


def test_places_in_a_pool_are_those_of_chosen_trees_where_heads_ignore_the_path():
    rng = np.random.default_rng(4)
    ranks = rng.integers(-1, 4, (50, 3))
    log_probs = np.sort(np.log(rng.dirichlet(np.ones(4), (50, 3)).astype(np.float32)))[..., ::-1]
    paths = [p for d in (1, 2, 3) for p in itertools.product(range(4), repeat=d)]
    of_nodes = np.stack([log_probs[:, len(p) - 1, p[-1]] for p in paths], 1)
    found = pool_places(ranks, of_nodes.copy(), paths)
    wanted = chosen_places(ranks, np.ascontiguousarray(log_probs), 20, (1, 1, 1))
    assert np.array_equal(np.minimum(found, 20), wanted)
