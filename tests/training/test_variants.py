"""Kinds of heads: trained, exported, loaded and served they compute the same; losses are plain."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.sequential_draft import SequentialDrafter
from vllm_medusa.sequential_heads import SequentialHeads
from vllm_medusa.training.calibrate import rank_labels
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.export import export_heads
from vllm_medusa.training.hidden_states import HiddenStateSet, label_rows
from vllm_medusa.training.loss import IGNORE, medusa_one_loss, medusa_one_loss_reference
from vllm_medusa.training.trainable_heads import TrainableHeads, low_rank
from vllm_medusa.training.trainer import MedusaOneTrainer
from vllm_medusa.tree import TokenTree

K, L, D, V = 3, 2, 12, 23
SUBSET = torch.tensor([1, 4, 5, 9, 20, 3])
KINDS = {
    "shared": {},
    "own": {"own_lm_head": True},
    "common": {"own_lm_head": True, "common_lm_head": True},
    "low rank": {"own_lm_head": True, "lm_head_rank": 4},
    "low rank, common": {"own_lm_head": True, "common_lm_head": True, "lm_head_rank": 4},
    "subset": {"vocab_subset_size": len(SUBSET)},
    "subset, own": {"vocab_subset_size": len(SUBSET), "own_lm_head": True},
    "sequential": {"sequential": True},
    "everything": {
        "sequential": True, "own_lm_head": True, "common_lm_head": True, "lm_head_rank": 4,
        "vocab_subset_size": len(SUBSET),
    },
}  # fmt: skip


def _spec(kind):
    return HeadSpec(K, L, D, V, bias=True, **KINDS[kind])


def _heads(kind, seed=0):
    """Heads of random weights that bfloat16 holds exactly."""
    spec = _spec(kind)
    generator = torch.Generator().manual_seed(seed)
    ids = SUBSET if spec.vocab_subset_size else None
    heads = TrainableHeads.from_spec(spec, torch.randn(V, D, generator=generator), ids)
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16().float() / 4
    return heads


def _inputs(kind, rows=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, D, generator=generator, dtype=dtype)
    path = torch.randn(rows, K, D, generator=generator, dtype=dtype)
    labels = torch.randint(0, V, (rows, K), generator=generator)
    labels[-1, 1:] = IGNORE
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    return hidden, labels, weight, path if _spec(kind).sequential else None


def _plain_logits(heads, hidden, weight, path):
    """[K][rows, output] by the definition, one head and one row at a time."""
    found = []
    for k in range(K):
        rows = []
        for r in range(len(hidden)):
            x = hidden[r]
            for layer in range(L):
                update = heads.weight[layer, k] @ x + heads.bias[layer, k]
                if layer == 0 and path is not None:
                    for j in range(k + 1):
                        e = path[r, j]
                        matrix = heads.path_weight[k * (k + 1) // 2 + j]
                        update = update + matrix @ (e / e.square().mean().sqrt())
                x = x + update * torch.sigmoid(update)
            output = weight if heads.lm_head is None else heads.lm_head[k % len(heads.lm_head)]
            if heads.lm_head is None and heads.token_map is not None:
                output = output[heads.token_map[0]]
            if heads.lm_head_down is not None:
                x = heads.lm_head_down[k] @ x
            rows.append(output @ x)
        found.append(torch.stack(rows))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_equal_the_plain_definition(kind):
    hidden, labels, weight, path = _inputs(kind, dtype=torch.float64)
    heads = _heads(kind).double()
    factors = (0.8, 0.64, 0.512)
    inputs = heads.loss_inputs(hidden, labels, weight, path)
    loss, _ = medusa_one_loss(*inputs, head_weights=factors, chunk_rows=3)
    loss.backward()
    found = {name: p.grad.clone() for name, p in heads.named_parameters()}
    heads.zero_grad()

    expected = torch.zeros((), dtype=torch.float64)
    for k, logits in enumerate(_plain_logits(heads, hidden, weight, path)):
        targets = labels[:, k]
        if heads.token_map is not None:
            places = {int(token): i for i, token in enumerate(heads.token_map[0])}
            targets = torch.tensor([places.get(int(t), IGNORE) for t in targets])
        if (targets != IGNORE).any():
            expected = expected + factors[k] * functional.cross_entropy(
                logits, targets, ignore_index=IGNORE
            )
    expected.backward()
    # float64 except for the scale of the path's embeddings, which is taken in float32.
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if path is not None else {"atol": 1e-12, "rtol": 1e-9}
    torch.testing.assert_close(loss, expected, **tolerance)
    for name, parameter in heads.named_parameters():
        wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(found[name], wanted, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_heads_serve_what_was_trained(kind, tmp_path):
    heads = _heads(kind)
    hidden, _, weight, path = _inputs(kind)
    export_heads(heads, tmp_path, V, "base", max_file_bytes=1500)
    weights = load_heads(tmp_path, vocab_size=V, hidden_size=D, dtype=torch.float32)
    assert weights.format == ("C2" if kind == "shared" else "M")
    served = MedusaHeads.from_weights(weights)
    expected = _plain_logits(heads, hidden, weight, path)
    found = served.top_tokens(hidden, 4, lambda x: functional.linear(x, weight), path)
    for k, logits in enumerate(expected):
        ids = logits.topk(4).indices
        if heads.token_map is not None:
            ids = heads.token_map[0][ids]
        assert torch.equal(found[:, k], ids)
    again = TrainableHeads.from_weights(weights)
    for name, parameter in heads.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter)


def test_stack_of_matrices_equals_the_reference():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (5, 2), generator=generator)
    for count in (1, 2):
        weight = torch.randn(count, 7, 4, generator=generator, dtype=torch.float64)
        found, _ = medusa_one_loss(hidden, weight, labels, (0.8, 0.64), 2)
        expected = medusa_one_loss_reference(hidden, weight, labels, (0.8, 0.64))
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="holds 3 matrices; expected 1 or 2"):
        medusa_one_loss(hidden, weight[:1].expand(3, 7, 4), labels, (0.8, 0.64))


def test_low_rank_start_is_the_best_of_that_rank():
    matrix = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(matrix, 3)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    # Both are float32 approximations of the unique optimum.
    torch.testing.assert_close(up @ down, u[:, :3] * s[:3] @ v[:3], atol=1e-4, rtol=1e-4)
    spec = HeadSpec(2, 1, 8, 30, bias=True, own_lm_head=True, lm_head_rank=8)
    heads = TrainableHeads.from_spec(spec, matrix)
    full = heads.lm_head[1] @ heads.lm_head_down[1]
    torch.testing.assert_close(full, matrix, atol=1e-4, rtol=1e-4)


def test_new_heads_start_as_the_lm_head():
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    path = torch.randn(4, K, D)
    for kind in ("own", "common", "subset", "subset, own", "sequential"):
        spec = _spec(kind)
        ids = SUBSET if spec.vocab_subset_size else None
        heads = TrainableHeads.from_spec(spec, weight, ids)
        labels = torch.zeros(4, K, dtype=torch.int64)
        seen = path if spec.sequential else None
        states, output, _ = heads.loss_inputs(hidden, labels, weight, seen)
        expected = hidden @ (weight if ids is None else weight[ids]).T
        for k in range(K):
            matrix = output if output.ndim == 2 else output[k % len(output)]
            torch.testing.assert_close(states[k] @ matrix.T, expected)


def _markov_data(rows=1500, states=11):
    """A random walk: token t+1 depends on token t alone, in two equally likely ways."""
    rng = np.random.default_rng(0)
    choices = rng.integers(0, states, (states, 2))
    tokens = np.zeros(rows, np.int64)
    for i, coin in enumerate(rng.integers(0, 2, rows - 1)):
        tokens[i + 1] = choices[tokens[i], coin]
    positions, labels = label_rows(tokens, np.ones(rows, bool), 2)
    table = torch.randn(states, 16, generator=torch.Generator().manual_seed(0))
    # The hidden state knows the current token only, so the next one is a toss-up.
    hidden = table[torch.from_numpy(tokens[positions])]
    return HiddenStateSet(hidden, torch.from_numpy(labels), np.array([0, rows - 1])), table


def test_sequential_heads_know_what_independent_ones_cannot():
    data, table = _markov_data()
    config = TrainConfig(num_heads=2, num_layers=1, epochs=30, batch_tokens=256,
                         learning_rate=0.02, warmup_steps=5, checkpoint_every=0)  # fmt: skip
    first = {}
    for sequential in (False, True):
        spec = HeadSpec(2, 1, 16, 11, bias=True, own_lm_head=True, sequential=sequential)
        heads = TrainableHeads.from_spec(spec, table)
        trainer = MedusaOneTrainer(config, data, table, heads=heads, embeddings=table)
        ranks = rank_labels(trainer.train(), data, table, 2, embeddings=table)
        first[sequential] = ranks.accuracies()[:, 0]
    # Two tosses lie before head 1's token (at best 1/2 correct more often than independent),
    # one before the sequential head's.
    assert (first[True] > first[False] + 0.1).all()


@pytest.mark.parametrize("kind", ["sequential", "everything"])
@pytest.mark.parametrize("tree", [[[0], [1], [0, 0], [0, 1], [1, 0], [1, 0, 0]], [[0]]])
def test_sequential_tree_equals_drafting_node_by_node(kind, tree):
    heads = MedusaHeads.from_weights(_heads(kind).to_weights(V, torch.float32))
    hidden, _, weight, _ = _inputs(kind)
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(5))
    roots = torch.arange(7)
    shape = TokenTree.from_paths(tree)

    def apply_lm_head(states):
        return functional.linear(states, weight)

    drafter = SequentialDrafter(SequentialHeads(heads.to_weights()), shape, 7)
    found = torch.empty(7, len(tree), dtype=torch.int64)
    drafter.draft(found, hidden, roots, lambda ids: table[ids], apply_lm_head)
    for request, (node, path) in itertools.product(range(7), enumerate(shape.paths)):
        tokens = [int(roots[request])]
        tokens += [int(found[request, shape.paths.index(path[:d])]) for d in range(1, len(path))]
        # Head len(path) must not look at the rows behind its own path.
        embedded = torch.full((1, K, D), 9.0)
        embedded[0, : len(tokens)] = table[tokens]
        row = hidden[request : request + 1]
        top = heads.top_tokens(row, path[-1] + 1, apply_lm_head, embedded)
        assert int(found[request, node]) == int(top[0, len(path) - 1, path[-1]])


def test_sequential_heads_ask_for_the_path():
    heads = MedusaHeads(HeadSpec(2, 1, 8, 9, dtype=torch.float32, sequential=True))
    with pytest.raises(ValueError, match="path_embeddings: found None, but sequential is True"):
        heads.forward_hidden(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"found shape \[3, 1, 8\], expected \[3, 2, 8\]"):
        heads.forward_hidden(torch.zeros(3, 8), torch.zeros(3, 1, 8))
    plain = MedusaHeads(HeadSpec(2, 1, 8, 9, dtype=torch.float32))
    with pytest.raises(ValueError, match="found a tensor, but sequential is False"):
        plain.forward_hidden(torch.zeros(3, 8), torch.zeros(3, 2, 8))
