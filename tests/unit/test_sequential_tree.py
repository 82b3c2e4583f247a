"""Trees of sequential heads, chosen at every step among the nodes of a fixed one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

pytest.importorskip("vllm")

from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.prompt_lookup import PromptLookup
from vllm_medusa.sequential_draft import ChosenSequentialDrafter, SequentialDrafter
from vllm_medusa.sequential_heads import SequentialHeads
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_batch import TreeBatch

SIZE, VOCAB = 16, 30
POOL = TokenTree.from_paths([[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [1, 1]])
# Sums of three log probabilities in float32, in another order.
TOLERANCE = 1e-5


class Inputs:
    """Random heads with a model's embeddings and lm_head, and some requests."""

    def __init__(self, num_reqs: int, num_layers: int = 1, **fields):
        torch.manual_seed(1)
        spec = HeadSpec(
            3, num_layers, SIZE, vocab_size=VOCAB, dtype=torch.float32, sequential=True, **fields
        )
        self.heads = MedusaHeads(spec).requires_grad_(False)
        for parameter in self.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        for token_map in () if self.heads.token_map is None else self.heads.token_map:
            token_map.copy_(torch.randperm(VOCAB)[: len(token_map)])
        self.table, self.lm_head = torch.randn(VOCAB, SIZE), torch.randn(VOCAB, SIZE)
        self.hidden, self.roots = torch.randn(num_reqs, SIZE), torch.arange(num_reqs) % VOCAB

    @property
    def arguments(self) -> tuple:
        return (
            self.hidden,
            self.roots,
            self.table,
            lambda states: functional.linear(states, self.lm_head),
        )

    def drafter(self, tree: TokenTree = POOL, max_num_reqs: int = 300) -> SequentialDrafter:
        return SequentialDrafter(SequentialHeads(self.heads.to_weights()), tree, max_num_reqs)


def chosen(inputs: Inputs, slots: list[int], lookup: PromptLookup | None = None):
    """Batch tables and drafts; every slot but 0 chooses."""
    batch = TreeBatch(POOL, max(slots) + 1, torch.device("cpu"))
    for slot in range(1, max(slots) + 1):
        batch.keep_tree(slot, False)
    drafter = inputs.drafter()
    out = torch.full((len(slots), POOL.num_nodes), -7)
    ChosenSequentialDrafter(drafter, batch, lookup).draft(
        out, torch.tensor(slots), *inputs.arguments
    )
    return drafter, batch, out


def paths(batch: TreeBatch, slot: int, drafts: torch.Tensor) -> list[tuple[int, ...]]:
    """Tokens from below the root to every node."""
    found: list[tuple[int, ...]] = [()]
    for parent, token in zip(batch.parents[slot, 1:].tolist(), drafts.tolist(), strict=True):
        found.append((*found[parent], token))
    return found[1:]


def test_log_probabilities_are_the_heads_own_behind_the_path():
    inputs = Inputs(2)
    tokens, log_probs = inputs.drafter().score(*inputs.arguments)
    tokens, log_probs = tokens.flatten(1), log_probs.flatten(1)
    for node, path in enumerate(POOL.paths):
        above = [POOL.paths.index(path[:d]) for d in range(1, len(path))]
        for req in range(2):
            seen = [int(inputs.roots[req]), *tokens[req, above].tolist()]
            embedded = torch.zeros(1, 3, SIZE)
            embedded[0, : len(seen)] = inputs.table[seen]
            states = inputs.heads.forward_hidden(inputs.hidden[req : req + 1], embedded)
            logits = functional.linear(states[len(path) - 1, 0], inputs.lm_head)
            want = logits.log_softmax(0)[tokens[req, node]]
            assert abs(log_probs[req, node] - want) <= TOLERANCE


def test_likeliest_nodes_come_first_and_below_their_parents():
    inputs = Inputs(3)
    drafter, batch, out = chosen(inputs, [2, 0, 3])
    tokens, log_probs = drafter.score(*inputs.arguments)
    tokens, log_probs = tokens.flatten(1), log_probs.flatten(1).double()
    for req, slot in ((0, 2), (2, 3)):
        whole = {}
        for path in POOL.paths:
            places = [POOL.paths.index(path[: d + 1]) for d in range(len(path))]
            whole[tuple(tokens[req, places].tolist())] = log_probs[req, places].sum().item()
        found = paths(batch, slot, out[req])
        assert sorted(found) == sorted(whole)
        sums = [whole[path] for path in found]
        assert all(a >= b - TOLERANCE for a, b in itertools.pairwise(sums))
    # Slot 0 keeps the fixed tree.
    assert batch.parents[0].tolist() == list(POOL.parents)
    assert out[1].tolist() == tokens[1, : POOL.num_nodes].tolist()


def test_history_takes_the_place_of_unlikely_nodes():
    inputs = Inputs(2)
    line = torch.tensor([*range(9, 20), *range(9, 17)], dtype=torch.int32)
    history = line.repeat(3, 1)
    lookup = PromptLookup(history, torch.tensor([19, 19, 19], dtype=torch.int32), 5, VOCAB)
    _, batch, out = chosen(inputs, [1, 0], lookup)
    found = paths(batch, 1, out[0])
    # Matched eight tokens, so at 0.95 a token: nothing of random heads is as sure.
    assert found[:5] == [tuple(range(17, 20))[: d + 1] for d in range(3)] + [
        (17, 18, 19, 9), (17, 18, 19, 9, 10),
    ]  # fmt: skip
    assert batch.parents[0].tolist() == list(POOL.parents)


KINDS = {
    "shared lm_head": {},
    "three blocks with biases": {"bias": True, "num_layers": 3},
    "shared lm_head, subset": {"vocab_subset_size": 20},
    "shared lm_head, a subset each": {"vocab_subset_size": 20, "vocab_subset_per_head": True},
    "common lm_head": {"own_lm_head": True, "common_lm_head": True, "vocab_subset_size": 20},
    "own lm_heads": {"own_lm_head": True},
    "low-rank lm_heads": {"own_lm_head": True, "lm_head_rank": 5},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("looked_up", [False, True], ids=["table", "lookup"])
def test_every_kind_drafts_what_its_heads_rank_first(name, looked_up):
    """Tokens of all nodes by the modules that train and rank the heads, path by path."""
    inputs = Inputs(2, **KINDS[name])
    hidden, roots, table, apply_lm_head = inputs.arguments
    embeddings = (lambda ids: table[ids]) if looked_up else table
    drafts = torch.full((2, POOL.num_nodes), -7)
    inputs.drafter().draft(drafts, hidden, roots, embeddings, apply_lm_head)
    for node, path in enumerate(POOL.paths):
        above = [POOL.paths.index(path[:d]) for d in range(1, len(path))]
        embedded = torch.zeros(2, 3, SIZE)
        embedded[:, : len(path)] = table[torch.cat([roots[:, None], drafts[:, above]], 1)]
        top = inputs.heads.top_tokens(hidden, path[-1] + 1, apply_lm_head, embedded)
        assert drafts[:, node].tolist() == top[:, len(path) - 1, path[-1]].tolist()


@pytest.mark.parametrize("name", KINDS)
def test_later_heads_draft_from_the_first_of_the_ids(name):
    """As heads of so many ids do, behind a first head that drafts as before."""
    inputs, later_size = Inputs(2, **KINDS[name]), 7
    weights = inputs.heads.to_weights()
    drafter = SequentialDrafter(SequentialHeads(weights, later_size=later_size), POOL, 2)
    whole, cut = (d.score(*inputs.arguments) for d in (inputs.drafter(), drafter))
    for head in (2, 3):
        token_map = drafter.heads.map_of(head)
        ids = torch.arange(later_size) if token_map is None else token_map[0]
        nodes = [node for node, path in enumerate(POOL.paths) if len(path) == head]
        assert torch.isin(cut[0].flatten(1)[:, nodes], ids).all()
        parts = torch.zeros(2, 1 + head, SIZE).normal_()
        few, all_ids = (
            d.heads.logits(head, parts, inputs.arguments[3]) for d in (drafter, inputs.drafter())
        )
        assert few.shape == (2, later_size)
        torch.testing.assert_close(few, all_ids[:, :later_size])
    first = [node for node, path in enumerate(POOL.paths) if len(path) == 1]
    for table, other in zip(whole, cut, strict=True):
        assert torch.equal(table.flatten(1)[:, first], other.flatten(1)[:, first])


def test_first_layers_of_heads_are_not_held_twice():
    heads = Inputs(1, bias=True, num_layers=3, own_lm_head=True, common_lm_head=True).heads
    packed = SequentialHeads(heads.to_weights())
    counts = [sum(p.numel() for p in module.parameters()) for module in (heads, packed)]
    assert counts[0] == counts[1] == heads.spec.num_parameters


def test_independent_heads_are_refused():
    weights = MedusaHeads(HeadSpec(3, 1, SIZE, vocab_size=VOCAB)).to_weights()
    with pytest.raises(ValueError, match="heads: found independent heads"):
        SequentialHeads(weights)


def test_a_missing_lm_head_is_named():
    inputs = Inputs(1)
    with pytest.raises(ValueError, match="apply_lm_head: found None"):
        inputs.drafter().score(*inputs.arguments[:3])


@pytest.mark.parametrize("num_reqs", [1, 64, 300])
def test_large_batches_draft_only_nodes_that_they_can_afford(num_reqs):
    inputs = Inputs(num_reqs)
    drafter = inputs.drafter()
    drafts = torch.full((num_reqs, POOL.num_nodes), -7)
    drafter.draft(drafts, *inputs.arguments)
    _, log_probs = drafter.score(*inputs.arguments)
    nodes = {1: 9, 64: 7, 300: 1}[num_reqs]
    is_drafted = log_probs.flatten(1)[:, :9] > float("-inf")
    assert is_drafted.sum(1).tolist() == [nodes] * num_reqs and is_drafted[:, :nodes].all()
    assert ((drafts >= 0) & (drafts < VOCAB)).all()
    again = torch.full_like(drafts, -7)
    drafter.draft(again[:1], *(a[:1] for a in inputs.arguments[:2]), *inputs.arguments[2:])
    # What one request drafted into the tables of another size is not seen later.
    drafter.draft(again, *inputs.arguments)
    assert torch.equal(again, drafts)
    whole = torch.full((num_reqs, nodes), -7)
    inputs.drafter(POOL.cut(nodes)).draft(whole, *inputs.arguments)
    assert torch.equal(drafts[:, :nodes], whole)
    _, batch, out = chosen(inputs, list(range(1, num_reqs + 1)))
    assert ((out >= 0) & (out < VOCAB)).all()
    assert (batch.parents[1:, 1:] < torch.arange(1, 10)).all()
