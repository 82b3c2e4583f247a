"""best_tree with chains: one tree of the heads' paths and what the history proposes."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_best_tree import POISON, arguments, log_softmax_table, tree_rows

from vllm_medusa.tree_candidates import candidate_paths
from vllm_medusa.triton_kernels import best_tree, reference
from vllm_medusa.triton_kernels.lookup_types import MAX_MATCH, Chains


def chain_costs(length, *, scale=0.2):
    """Costs that rise along a chain and fall with the match."""
    rows = [
        np.cumsum(np.full(length, scale * (MAX_MATCH + 1 - match), np.float32))
        for match in range(MAX_MATCH + 1)
    ]
    rows[0][:] = np.inf
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def merged(log_probs, tokens, chain, costs, num_nodes):
    """The definition, of one request: (token path, cost) of the tree's nodes in order.

    A node is the tokens that lead to it. Heads and chain may both name it; the lower cost
    counts. Among equals the heads' come first, in the order of their candidates.
    """
    known = np.where(np.isnan(log_probs), -np.inf, np.minimum(log_probs, 0)).astype(np.float32)
    nodes = {}
    for path in candidate_paths(num_nodes, [known.shape[1]] * known.shape[0]):
        cost = np.float32(0)
        for head, rank in enumerate(path):
            cost = cost - known[head, rank]
        nodes[tuple(int(tokens[head, rank]) for head, rank in enumerate(path))] = cost
    if costs is not None:
        for depth in range(1, len(chain) + 1):
            path = tuple(chain[:depth])
            nodes[path] = min(nodes.get(path, np.float32(np.inf)), costs[depth - 1])
    order = sorted(nodes, key=lambda path: nodes[path])
    return order[:num_nodes]


def run_both(log_probs, tokens, chains, matches, num_nodes, device, **options):
    """Kernel's drafts and tables, equal to the twin's."""
    results = []
    for choose, where in ((best_tree, device), (reference.best_tree, "cpu")):
        own = arguments(log_probs, num_nodes, where, **options)
        own["tokens"] = tokens.to(where)
        own["chains"] = Chains(
            torch.tensor(chains, device=where),
            torch.tensor(matches, dtype=torch.int32, device=where),
            chain_costs(len(chains[0])).to(where),
        )
        choose(**own)
        assert (own["out"][-1] == POISON).all()
        results.append((own["out"][:-1].cpu(), [table.cpu() for table in own["tables"]]))
    (drafts, tables), (twin_drafts, twin_tables) = results
    assert torch.equal(drafts, twin_drafts)
    assert all(torch.equal(a, b) for a, b in zip(tables, twin_tables, strict=True))
    return drafts, tables


def check(log_probs, tokens, chains, matches, num_nodes, device):
    """Kernel and twin against the definition."""
    drafts, tables = run_both(log_probs, tokens, chains, matches, num_nodes, device)
    costs = chain_costs(len(chains[0])).numpy()
    for r, match in enumerate(matches):
        own = costs[match] if match else None
        paths = merged(log_probs[r].float().numpy(), tokens[r].numpy(), chains[r], own, num_nodes)
        assert drafts[r].tolist() == [path[-1] for path in paths]
        for found, want in zip(tables, tree_rows(paths), strict=True):
            assert found[2 * r + 1].tolist() == want
            assert (found[2 * r, 1:] == POISON).all()


def few_tokens(shape, words, rng):
    """Distinct tokens of every head out of a few, so that heads and chains meet."""
    num_reqs, num_heads, num_top = shape
    rows = [rng.sample(range(words), num_top) for _ in range(num_reqs * num_heads)]
    return torch.tensor(rows).view(shape)


def test_a_chain_of_other_tokens_stands_beside_the_heads(device):
    """Costs 0.2, 0.4, .. beside the heads' 0.1 and 2.4."""
    log_probs = torch.tensor([[[-0.1, -2.4], [-0.7, -0.9]]])
    tokens = torch.tensor([[[1, 2], [3, 4]]])
    drafts, (parents, depths, masks) = run_both(
        log_probs, tokens, [[7, 8, 9]], [MAX_MATCH], 4, device
    )
    assert drafts[0].tolist() == [1, 7, 8, 9]
    assert parents[1].tolist() == [-1, 0, 0, 2, 3]
    assert depths[1].tolist() == [0, 1, 1, 2, 3]
    assert masks[1].tolist() == [0b1, 0b11, 0b101, 0b1101, 0b11101]


def test_what_both_propose_stands_once(device):
    """The heads' 1, 4 at 0.1 and 1.0 are the chain's at 0.2 and 0.4; 9 goes on below them."""
    log_probs = torch.tensor([[[-0.1, -2.4], [-0.7, -0.9]]])
    tokens = torch.tensor([[[1, 2], [3, 4]]])
    drafts, (parents, *_) = run_both(log_probs, tokens, [[1, 4, 9]], [MAX_MATCH], 4, device)
    assert drafts[0].tolist() == [1, 4, 9, 3]
    assert parents[1].tolist() == [-1, 0, 1, 2, 1]


def test_without_a_match_the_tree_is_the_heads(device):
    log_probs = log_softmax_table((2, 3, 5), seed=1)
    own = arguments(log_probs, 9, device)
    best_tree(**own)
    tokens = own["tokens"].cpu()
    drafts, tables = run_both(log_probs, tokens, [[-1] * 6] * 2, [0, 0], 9, device)
    assert torch.equal(drafts, own["out"][:-1].cpu())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(tables, own["tables"], strict=True))


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7, 8, 9, 31, 32, 33, 62, 63])
@pytest.mark.parametrize("length", [1, 16, 63])
def test_sizes(device, num_nodes, length):
    rng = random.Random(num_nodes)
    shape = (2, 4, min(num_nodes, 8))
    chains = [[rng.randrange(12) for _ in range(length)] for _ in range(2)]
    tokens = few_tokens(shape, 12, rng)
    check(log_softmax_table(shape, seed=num_nodes), tokens, chains, [8, 3], num_nodes, device)


def test_chains_that_the_heads_spell_as_far_as_they_reach(device):
    """Of all depths at once: no, some, all heads' first ranks, and shorter than they reach."""
    log_probs = log_softmax_table((5, 3, 4), seed=2)
    tokens = torch.arange(60).view(5, 3, 4)
    first = tokens[:, :, 0].tolist()
    chains = [[*row[:same], *range(100 + same, 106)] for same, row in enumerate(first[:4])]
    chains.append([int(tokens[4, 0, 3]), int(tokens[4, 1, 2]), int(tokens[4, 2, 1]), 9, 9, 9])
    check(log_probs, tokens, chains, [8, 7, 6, 5, 4], 12, device)
    cut = [chain[:2] for chain in chains]
    check(log_probs, tokens, cut, [8, 7, 6, 5, 4], 12, device)


def test_impossible_heads_leave_the_chain(device):
    log_probs = torch.full((1, 2, 3), float("-inf"))
    tokens = torch.arange(6).view(1, 2, 3)
    drafts, (parents, *_) = run_both(log_probs, tokens, [[7, 7, 7, 7]], [8], 4, device)
    assert drafts[0].tolist() == [7] * 4
    assert parents[1].tolist() == [-1, 0, 1, 2, 3]


def test_fixed_trees_know_no_chain(device):
    log_probs = log_softmax_table((2, 3, 5), seed=3)
    tokens = 1000 + torch.arange(30).view(2, 3, 5)
    drafts, (parents, *_) = run_both(
        log_probs, tokens, [[1, 2, 3]] * 2, [8, 8], 9, device, fixed_slots={3}
    )
    assert drafts[1].tolist() == [1015 + column for column in range(9)]
    assert parents[3].tolist() == list(range(-1, 9))
    assert drafts[0, 0] == 1 or drafts[0, 1] == 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_nodes=st.integers(1, 40),
    heads=st.integers(1, 4),
    length=st.integers(1, 20),
    words=st.integers(6, 14),
)
def test_any_heads_and_chains(device, seed, num_nodes, heads, length, words):
    rng = random.Random(seed)
    ranks = min(words, num_nodes, 6)
    if len(candidate_paths(num_nodes, [ranks] * heads)) < num_nodes:
        return
    shape = (1, heads, ranks)
    chain = [rng.randrange(words) for _ in range(length)]
    log_probs = log_softmax_table(shape, scale=seed % 7 / 2, seed=seed)
    tokens = few_tokens(shape, words, rng)
    check(log_probs, tokens, [chain], [rng.randrange(MAX_MATCH + 1)], num_nodes, device)


BAD_CHAINS = [
    ("tokens", lambda t: t.int()),
    ("tokens", lambda t: t[:1]),
    ("tokens", lambda t: t[:, :0]),
    ("matches", lambda t: t.long()),
    ("costs", lambda t: t[1:]),
    ("costs", lambda t: t.double()),
]


@pytest.mark.parametrize(("field", "change"), BAD_CHAINS)
@pytest.mark.parametrize("choose", [best_tree, reference.best_tree], ids=["kernel", "twin"])
def test_bad_chains_are_named(device, choose, field, change):
    own = arguments(log_softmax_table((2, 2, 4)), 4, device)
    matches = torch.ones(2, dtype=torch.int32, device=device)
    good = Chains(
        torch.zeros(2, 5, dtype=torch.int64, device=device), matches, chain_costs(5).to(device)
    )
    bad = good._replace(**{field: change(getattr(good, field))})
    with pytest.raises(ValueError, match=rf"^chains\.{field}: found .*, expected "):
        choose(**own, chains=bad)
