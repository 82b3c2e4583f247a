"""Prompt lookup in trees: prices, options, and whose history is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_medusa.config import DEFAULT_LOOKUP, MedusaOptions
from vllm_medusa.dynamic_tree import DynamicDrafter
from vllm_medusa.kernels import MAX_MATCH
from vllm_medusa.prompt_lookup import SHARES, PromptLookup, chain_costs
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_batch import TreeBatch

TREE = TokenTree.from_paths([[0], [1], [0, 0], [2], [0, 1]])


def test_prices_multiply_shares_along_the_chain():
    costs = chain_costs(5)
    assert costs.shape == (MAX_MATCH + 1, 5) and costs.dtype == np.float32
    assert np.isinf(costs[0]).all()
    for match in range(1, MAX_MATCH + 1):
        product = 1.0
        for depth in range(5):
            product *= SHARES[min(match + depth, MAX_MATCH) - 1]
            assert costs[match, depth] == pytest.approx(-np.log(product), rel=1e-6)


def test_prices_never_fall_along_a_chain_and_never_rise_with_the_match():
    costs = chain_costs(63)[1:]
    assert (np.diff(costs, axis=1) >= 0).all()
    assert (np.diff(costs, axis=0) <= 0).all()


def test_a_request_goes_on_as_its_history_did():
    """Heads that know nothing: slot 1 repeats itself, slot 3 does not, slot 0 keeps its tree."""
    batch = TreeBatch(TREE, 4, torch.device("cpu"))
    for slot in (1, 3):
        batch.keep_tree(slot, False)
    line = [*range(20, 30), *range(20, 28)]
    history = torch.zeros(4, 32, dtype=torch.int32)
    history[1, : len(line)] = history[0, : len(line)] = torch.tensor(line)
    history[3, :4] = torch.tensor([5, 6, 7, 8])
    lengths = torch.tensor([len(line), len(line), 0, 4], dtype=torch.int32)
    lookup = PromptLookup(history, lengths, 16, 40)
    drafter = DynamicDrafter(batch, num_heads=3, vocab_size=40, lookup=lookup)
    out = torch.zeros(3, 5, dtype=torch.int64)
    drafter.draft(out, torch.zeros(3, 3, 40), torch.tensor([1, 3, 0]), None)
    # 28 and 29, then 20 .. again.
    assert out[0].tolist() == [28, 29, 20, 21, 22]
    assert batch.parents[1].tolist() == [-1, 0, 1, 2, 3, 4]
    assert out[1].tolist() == [0, 1, 2, 3, 4]
    assert batch.parents[3].tolist() == [-1] + [0] * 5
    assert batch.parents[0].tolist() == list(TREE.parents)


def test_default_follows_the_tree():
    assert MedusaOptions("heads", tree="dynamic").lookup_length == DEFAULT_LOOKUP
    assert MedusaOptions("heads", tree="dynamic", prompt_lookup=0).lookup_length == 0
    assert MedusaOptions("heads", tree="dynamic", prompt_lookup=5).lookup_length == 5
    assert MedusaOptions("heads").lookup_length == 0
    assert MedusaOptions("heads", prompt_lookup=0).lookup_length == 0


@pytest.mark.parametrize("length", [-1, 64, True, "8", 2.0])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(ValueError, match=r"prompt_lookup=.* integer from 0 \(none\) to 63"):
        MedusaOptions("heads", tree="dynamic", prompt_lookup=length)


def test_trees_that_are_not_chosen_have_no_place_for_it():
    with pytest.raises(ValueError, match=r'prompt_lookup=8 needs trees .* add "tree": "dynamic"'):
        MedusaOptions("heads", tree="static", prompt_lookup=8)
