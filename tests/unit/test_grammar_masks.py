"""Masks of a tree against a grammar that is started anew for every node."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_medusa.grammar_masks import ALLOW_ALL, GrammarTree, tree_masks
from vllm_medusa.tree import TokenTree

VOCAB, END = 40, 39
TREE = TokenTree.preset("mc_sim_7b_63").cut(40)
BEGIN = 7  # what ends the reasoning in these tests


class Automaton:
    """A random deterministic automaton behind vLLM's interface of a grammar."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.next_state = rng.integers(0, 6, size=(6, VOCAB))
        self.allowed = rng.random((6, VOCAB)) < 0.5
        self.allowed[5, END] = True
        self.history = [0]
        self.calls = 0

    def is_terminated(self) -> bool:
        return self.history[-1] == -1

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        for token in tokens:
            state = self.history[-1]
            assert state != -1, "fed after its end"
            if not self.allowed[state, token]:
                return False
            self.history.append(-1 if token == END else int(self.next_state[state, token]))
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        (token,) = tokens
        return tokens if self.allowed[self.history[-1], token] else []

    def rollback(self, count: int) -> None:
        del self.history[len(self.history) - count :]

    def fill_bitmask(self, masks: torch.Tensor, index: int) -> None:
        self.calls += 1
        bits = np.zeros(64, dtype=np.uint8)
        bits[:VOCAB] = self.allowed[self.history[-1]]
        words = np.packbits(bits, bitorder="little").view(np.int32)
        masks[index] = torch.from_numpy(words)


class Manager:
    """vLLM's manager, with a parser that ends the reasoning at the token ``BEGIN``."""

    def __init__(self, reasoning: bool = False):
        self.reasoning = reasoning
        self.backend = SimpleNamespace(
            allocate_token_bitmask=lambda rows: torch.full((rows, 2), 99, dtype=torch.int32)
        )

    def _get_constraint_bounds(self, request, tokens) -> SimpleNamespace:
        start = 0
        if self.reasoning:
            tokens = list(tokens)
            start = tokens.index(BEGIN) + 1 if BEGIN in tokens else len(tokens) + 1
        return SimpleNamespace(grammar_start=start, constraint_start=start)


def path_of(row: int) -> list[int]:
    path = [row]
    while TREE.parents[path[0]] > 0:
        path.insert(0, TREE.parents[path[0]])
    return path if row else []


def expected_mask(seed: int, tokens: list[int]) -> np.ndarray | None:
    """Allowed tokens behind a path, alone; None: it cannot be taken, or nothing binds it."""
    grammar = Automaton(seed)
    for token in tokens:
        if grammar.is_terminated() or not grammar.accept_tokens("", [token]):
            return None
    return None if grammar.is_terminated() else grammar.allowed[grammar.history[-1]]


def unpacked(words: torch.Tensor) -> np.ndarray:
    return np.unpackbits(words.numpy().view(np.uint8), bitorder="little")[:VOCAB].astype(bool)


def a_request(seed: int) -> SimpleNamespace:
    return SimpleNamespace(structured_output_request=SimpleNamespace(grammar=Automaton(seed)))


@pytest.mark.parametrize("reasoning", [False, True])
def test_masks_follow_the_paths(reasoning):
    rng, bound = np.random.default_rng(3), 0
    for _ in range(40):
        seeds = rng.integers(0, 1000, size=3).tolist()
        requests = {str(i): a_request(seed) for i, seed in enumerate(seeds)}
        drafts = {
            name: rng.choice([3, 5, BEGIN, 11, END], size=rng.integers(1, 41)).tolist()
            for name in requests
        }
        # One request has no drafts, one placeholders.
        drafts["1"] = [-1] * 5
        del drafts["2"]
        masks, acceptable = tree_masks(Manager(reasoning), TREE, requests, list(requests), drafts)
        assert acceptable == [len(drafts["0"]), 0, 0]
        assert masks.shape[0] == len(drafts["0"]) + 1 + 6 + 1
        assert all(r.structured_output_request.grammar.history == [0] for r in requests.values())
        tokens = [-1, *drafts["0"]]
        for row in range(len(tokens)):
            path = [tokens[r] for r in path_of(row)]
            if reasoning:
                path = path[path.index(BEGIN) + 1 :] if BEGIN in path else None
            expected = None if path is None else expected_mask(seeds[0], path)
            found = torch.from_numpy(masks[row])
            if expected is None:
                assert (found == ALLOW_ALL).all()
            else:
                assert (unpacked(found) == expected).all()
                bound += row > 0
        first = len(tokens)
        assert (masks[first + 1 : first + 6] == ALLOW_ALL).all()
        if not reasoning:
            assert (unpacked(torch.from_numpy(masks[first])) == expected_mask(seeds[1], [])).all()
            assert (unpacked(torch.from_numpy(masks[-1])) == expected_mask(seeds[2], [])).all()
    assert bound > 100


def test_forbidden_branches_cost_nothing():
    """A node that its parent's mask forbids is not looked into."""
    grammar = Automaton(0)
    grammar.allowed[:] = False
    filled = GrammarTree(TREE, [5] * TREE.num_nodes)
    masks = torch.zeros(filled.num_rows, 2, dtype=torch.int32)
    everywhere = np.ones(filled.num_rows, dtype=bool)
    filled.fill(grammar, "", masks, everywhere, everywhere)
    assert grammar.calls == 1
    assert (masks[1:] == ALLOW_ALL).all() and not unpacked(masks[0]).any()
