"""Exact acceptance over trees leaves the distribution of whole sequences as it is.

Small random models over small vocabularies, random trees, random drafts: sequences made by
walking trees are counted and held against the product of the model's probabilities.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vllm_medusa.kernels import WalkOutput, tree_walk
from vllm_medusa.tree import TokenTree

# Standard deviations beyond which a sum of chi-squares is no accident.  Seeds are fixed, so
# a right rule never fails by chance; the biased one is seen with a margin.
SURE = 5.0
# (vocabulary, length, widths of the tree's levels at most)
SHAPES = ((2, 2, (2, 2)), (2, 3, (2, 1, 1)), (3, 2, (3, 2)), (3, 3, (2, 2, 2)), (4, 2, (4, 1)))


class Model:
    """Next-token probabilities of every context of a small vocabulary.

    Contexts are numbered like a heap: context c followed by token t is ``c * V + t + 1``.
    """

    def __init__(self, rng: np.random.Generator, vocab: int, length: int):
        self.vocab, self.length = vocab, length
        count = sum(vocab**n for n in range(length))
        self.probs = rng.dirichlet(np.ones(vocab), size=count)
        self.cumulative = self.probs.cumsum(1)[:, :-1]

    def draw(self, rng: np.random.Generator, contexts: np.ndarray) -> np.ndarray:
        """A token behind each context."""
        uniform = rng.random(contexts.shape)
        return (uniform[..., None] >= self.cumulative[contexts]).sum(-1)

    def sequences(self) -> tuple[int, np.ndarray]:
        """Number of the first context of full length, and the probability of each of them."""
        joint, level = np.ones(1), 0
        for n in range(self.length):
            count = self.vocab**n
            joint = (joint[:, None] * self.probs[level : level + count]).ravel()
            level += count
        return level, joint


def random_tree(rng: np.random.Generator, widths: tuple[int, ...]) -> TokenTree:
    """A random part of the Cartesian tree, with at least its first node."""
    paths = [[0]]
    for path in TokenTree.from_widths(list(widths)).paths[1:]:
        if (len(path) == 1 or list(path[:-1]) in paths) and rng.random() < 0.7:
            paths.append(list(path))
    return TokenTree.from_paths(paths)


class Walker:
    """Makes sequences of a model by walking one tree, many sequences at a time."""

    def __init__(self, rng: np.random.Generator, model: Model, tree: TokenTree, bias: float):
        self.rng, self.model, self.tree, self.bias = rng, model, tree, bias
        # Drafts depend on the context alone: distinct tokens by rank, whatever their probability.
        shape = (model.probs.shape[0], tree.max_depth)
        self.drafts = rng.permuted(
            np.broadcast_to(np.arange(model.vocab), (*shape, model.vocab)), axis=-1
        )
        self.draws = 0

    def rows(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token, context and drawn token of every row, [n, W] each.

        Contexts beyond the length draw like the empty one: what they yield is cut off.
        """
        tree, model = self.tree, self.model
        tokens = np.zeros((len(contexts), tree.num_rows), dtype=np.int64)
        behind = np.zeros_like(tokens)
        behind[:, 0] = contexts
        for row in range(1, tree.num_rows):
            tokens[:, row] = self.drafts[contexts, tree.depths[row] - 1, tree.ranks[row]]
            behind[:, row] = behind[:, tree.parents[row]] * model.vocab + tokens[:, row] + 1
        known = np.where(behind < len(model.probs), behind, 0)
        drawn = model.draw(self.rng, known)
        self.draws += drawn.size
        if self.bias:
            # The first child is taken now and then without having been drawn.
            wrong = self.rng.random(len(contexts)) < self.bias
            drawn[:, 0] = np.where(wrong, tokens[:, 1], drawn[:, 0])
        return tokens, behind, drawn

    def walk(self, tokens: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Row that ends each walk; the vectorised twin of ``tree_walk``."""
        parents = np.array(self.tree.parents)
        everyone = np.arange(len(tokens))
        current = np.zeros(len(tokens), dtype=np.int64)
        for _ in range(self.tree.max_depth):
            match = parents == current[:, None]
            match &= tokens == drawn[everyone, current][:, None]
            current = np.where(match.any(1), match.argmax(1), current)
        return current

    def make(self, count: int) -> np.ndarray:
        """Contexts of full length, ``count`` of them."""
        first, _ = self.model.sequences()
        contexts = np.zeros(count, dtype=np.int64)
        done = []
        while len(contexts):
            tokens, behind, drawn = self.rows(contexts)
            last = self.walk(tokens, drawn)
            check_walk(self.tree, tokens[:32], drawn[:32], last[:32])
            everyone = np.arange(len(contexts))
            contexts = behind[everyone, last] * self.model.vocab + drawn[everyone, last] + 1
            # Cut what is too long, as max_tokens does.
            while (long := contexts >= first + self.model.vocab**self.model.length).any():
                contexts = np.where(long, (contexts - 1) // self.model.vocab, contexts)
            done.append(contexts[contexts >= first] - first)
            contexts = contexts[contexts < first]
        return np.concatenate(done)


def check_walk(tree, tokens, drawn, last) -> None:
    """The plugin's own walk ends at the same rows."""
    num_reqs, width = tokens.shape
    out = WalkOutput.empty(num_reqs, num_reqs * width, width, torch.device("cpu"))
    tree_walk(
        out,
        torch.from_numpy(drawn).flatten(),
        torch.from_numpy(tokens).flatten(),
        torch.ones(num_reqs * width, dtype=torch.int64),
        torch.arange(num_reqs + 1, dtype=torch.int32) * width,
        torch.full((num_reqs,), width + 1, dtype=torch.int32),
        torch.arange(num_reqs),
        torch.tensor([tree.parents] * num_reqs, dtype=torch.int32),
        torch.ones(num_reqs, dtype=torch.int32),
    )
    assert (out.last_rows.numpy() - np.arange(num_reqs) * width == last).all()


def deviation(num_draws: int, trees: int, bias: float, seed: int) -> float:
    """Standard deviations by which sequences over random trees miss their distribution."""
    rng = np.random.default_rng(seed)
    chi_square, freedom, drawn = 0.0, 0, 0
    for index in range(trees):
        vocab, length, widths = SHAPES[index % len(SHAPES)]
        model = Model(rng, vocab, length)
        walker = Walker(rng, model, random_tree(rng, widths), bias)
        _, joint = model.sequences()
        counts = np.zeros(len(joint))
        while walker.draws < num_draws // trees:
            left = num_draws // trees - walker.draws
            made = walker.make(min(200_000, left // walker.tree.num_rows + 1))
            counts += np.bincount(made, minlength=len(joint))
        expected = joint * counts.sum()
        # Cells too small for a chi-square are counted as one.
        small = expected < 10
        if small.any():
            counts = np.append(counts[~small], counts[small].sum())
            expected = np.append(expected[~small], expected[small].sum())
        chi_square += ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
        freedom += len(counts) - 1
        drawn += walker.draws
    assert drawn >= num_draws
    # Wilson and Hilferty: the cube root of a chi-square is nearly normal.
    spread = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_sequences_over_trees_are_the_model_s():
    assert abs(deviation(1_000_000, trees=20, bias=0.0, seed=1)) < SURE


def test_a_bias_of_one_per_cent_is_seen():
    assert deviation(1_000_000, trees=20, bias=0.01, seed=1) > SURE


@pytest.mark.long
def test_sequences_over_trees_are_the_model_s_in_10_8_draws():
    assert abs(deviation(100_000_000, trees=20, bias=0.0, seed=2)) < SURE


@pytest.mark.long
def test_a_bias_of_a_tenth_of_a_per_cent_is_seen():
    assert deviation(100_000_000, trees=20, bias=0.001, seed=2) > SURE
