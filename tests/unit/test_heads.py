"""Batched heads agree with the paper's formula, head by head."""

from __future__ import annotations

import pytest
import torch

from vllm_medusa.head_weights import HeadSpec, HeadWeights
from vllm_medusa.heads import MedusaHeads

K, D, V = 3, 16, 40

# float64 sums of 16 products: the order of additions is all that differs.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}

VARIANTS = {
    "own": {"own_lm_head": True},
    "shared": {},
    "common": {"own_lm_head": True, "common_lm_head": True},
}
SUBSETS = {
    "full": {},
    "common subset": {"vocab_subset_size": 9},
    "subset per head": {"vocab_subset_size": 9, "vocab_subset_per_head": True},
}


def random_heads(num_layers=1, dtype=torch.float64, **fields) -> MedusaHeads:
    spec = HeadSpec(K, num_layers, D, vocab_size=V, dtype=dtype, **fields)
    heads = MedusaHeads(spec)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if heads.token_map is not None:
            for row in heads.token_map:
                row.copy_(torch.randperm(V)[: spec.vocab_subset_size])
    return heads


def plain_logits(heads: MedusaHeads, hidden, base_lm_head):
    """Return the formula of section 2.1.1, one token and one head at a time: [n][K] of [V']."""
    result = []
    for h in hidden:
        row = []
        for head in range(heads.spec.num_heads):
            x = h
            for layer in range(heads.spec.num_layers):
                y = heads.weight[layer, head] @ x
                if heads.bias is not None:
                    y = y + heads.bias[layer, head]
                x = x + y * torch.sigmoid(y)
            if heads.lm_head is not None:
                lm_head = heads.lm_head[min(head, heads.lm_head.shape[0] - 1)]
            elif heads.token_map is not None:
                lm_head = base_lm_head[plain_map(heads, head)]
            else:
                lm_head = base_lm_head
            row.append(lm_head @ x)
        result.append(torch.stack(row))
    return torch.stack(result)


def plain_map(heads, head):
    return heads.token_map[min(head, heads.token_map.shape[0] - 1)]


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_the_formula(num_layers, bias, subset, variant):
    heads = random_heads(num_layers, bias=bias, **VARIANTS[variant], **SUBSETS[subset])
    hidden, base = torch.randn(5, D).double(), torch.randn(V, D).double()
    shared = variant == "shared"
    expected = plain_logits(heads, hidden, base)
    logits = heads(hidden, base if shared else None)
    assert logits.shape == (5, K, heads.spec.output_size)
    torch.testing.assert_close(logits, expected, **TOLERANCE)

    ids = heads.top_tokens(hidden, 4, (lambda states: states @ base.T) if shared else None)
    assert ids.shape == (5, K, 4) and ids.dtype == torch.int64
    for token in range(5):
        for head in range(K):
            order = expected[token, head].argsort(descending=True)[:4]
            if heads.token_map is not None:
                order = plain_map(heads, head)[order]
            assert ids[token, head].tolist() == order.tolist()


def test_forward_hidden_shape_and_one_call_for_the_shared_lm_head():
    heads = random_heads(2, bias=True)
    hidden, base = torch.randn(4, D).double(), torch.randn(V, D).double()
    states = heads.forward_hidden(hidden)
    assert states.shape == (K, 4, D)
    seen = []

    def apply_lm_head(rows):
        seen.append(rows)
        return rows @ base.T

    heads.top_tokens(hidden, 1, apply_lm_head)
    assert len(seen) == 1, "one product for all heads"
    assert torch.equal(seen[0].view(4, K, D), states.transpose(0, 1))


def test_no_tokens():
    heads = random_heads(own_lm_head=True)
    empty = torch.zeros(0, D).double()
    assert heads(empty).shape == (0, K, V)
    assert heads.top_tokens(empty, 3).shape == (0, K, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    heads = random_heads(bias=True, own_lm_head=True, dtype=dtype)
    logits = heads(torch.randn(2, D).to(dtype))
    assert logits.dtype == dtype and torch.isfinite(logits).all()


def test_new_heads_are_the_base_lm_head():
    # Paper section 2.1.1: W1 = 0 and W2 = copy of the lm_head.
    base, hidden = torch.randn(V, D), torch.randn(3, D)
    expected = (hidden @ base.T)[:, None].expand(3, K, V)
    shared = MedusaHeads(HeadSpec(K, 1, D, V, bias=True, dtype=torch.float32))
    torch.testing.assert_close(shared(hidden, base), expected)
    own = MedusaHeads(HeadSpec(K, 2, D, V, own_lm_head=True, dtype=torch.float32))
    own.copy_lm_head(base)
    assert all(torch.equal(lm_head, base) for lm_head in own.lm_head)
    torch.testing.assert_close(own(hidden), expected)


def test_copy_lm_head_takes_the_rows_of_each_subset():
    heads = random_heads(own_lm_head=True, vocab_subset_size=5, vocab_subset_per_head=True)
    base = torch.randn(V, D).double()
    heads.copy_lm_head(base)
    for head in range(K):
        assert torch.equal(heads.lm_head[head], base[heads.token_map[head]])


def test_layers_are_independent():
    # The original code repeats one module object; a gradient step would move both.
    heads = random_heads(2)
    heads(torch.randn(2, D).double(), torch.randn(V, D).double()).square().sum().backward()
    assert not torch.equal(heads.weight.grad[0], heads.weight.grad[1])


def test_nothing_depends_on_data():
    # Tracing with fake tensors fails on any .item(), .tolist() or data-dependent shape,
    # the operations that break CUDA graph capture.
    from torch._subclasses.fake_tensor import FakeTensorMode

    for subset in SUBSETS.values():
        with FakeTensorMode():
            spec = HeadSpec(K, 2, D, V, bias=True, dtype=torch.float16, **subset)
            heads = MedusaHeads(spec)
            base = torch.empty(V, D, dtype=torch.float16)
            hidden = torch.empty(6, D, dtype=torch.float16)
            ids = heads.top_tokens(hidden, 3, lambda rows, base=base: rows @ base.T)
            assert ids.shape == (6, K, 3)
            assert heads(hidden, base).shape == (6, K, spec.output_size)


@pytest.mark.gpu
def test_cuda_graph_replays_new_inputs():
    heads = random_heads(own_lm_head=True, bias=True, vocab_subset_size=9, dtype=torch.float32)
    heads = heads.cuda()
    hidden = torch.zeros(4, D, device="cuda")
    with torch.no_grad():
        heads.top_tokens(hidden, 3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ids = heads.top_tokens(hidden, 3)
        hidden.copy_(torch.randn(4, D))
        graph.replay()
        assert torch.equal(ids, heads.top_tokens(hidden, 3))


def test_weights_round_trip():
    heads = random_heads(2, bias=True, own_lm_head=True, vocab_subset_size=9)
    copy = MedusaHeads.from_weights(heads.to_weights(metadata={"note": 1}))
    for name in ("weight", "bias", "lm_head", "token_map"):
        assert torch.equal(getattr(copy, name), getattr(heads, name))
    with torch.no_grad():
        heads.weight.zero_()
    assert copy.weight.abs().sum() > 0, "copies, not views"


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_heads(subset, variant):
    heads = random_heads(bias=True, **VARIANTS[variant], **SUBSETS[subset])
    two = MedusaHeads.from_weights(heads.to_weights().first_heads(2))
    base = torch.randn(V, D).double() if variant == "shared" else None
    hidden = torch.randn(3, D).double()
    torch.testing.assert_close(two(hidden, base), heads(hidden, base)[:, :2], **TOLERANCE)


class TestRefusals:
    @pytest.mark.parametrize(
        "hidden", [torch.zeros(2, D + 1).double(), torch.zeros(D).double(), torch.zeros(2, D)]
    )
    def test_hidden(self, hidden):
        with pytest.raises(ValueError, match=r"hidden: found .* expected \[num_tokens, 16\]"):
            random_heads(own_lm_head=True)(hidden)

    def test_lm_head(self):
        hidden = torch.zeros(1, D).double()
        with pytest.raises(ValueError, match=r"lm_head_weight: found None"):
            random_heads()(hidden)
        with pytest.raises(ValueError, match=r"lm_head_weight: found a tensor"):
            random_heads(own_lm_head=True)(hidden, torch.zeros(V, D).double())
        with pytest.raises(ValueError, match=r"apply_lm_head: found None"):
            random_heads().top_tokens(hidden, 1)
        with pytest.raises(ValueError, match=r"copy_lm_head"):
            random_heads().copy_lm_head(torch.zeros(V, D))

    @pytest.mark.parametrize("num_top", [0, 10])
    def test_num_top(self, num_top):
        heads = random_heads(own_lm_head=True, vocab_subset_size=9)
        with pytest.raises(ValueError, match=rf"num_top: found {num_top}, expected 1..9"):
            heads.top_tokens(torch.zeros(1, D).double(), num_top)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"num_heads": 0}, "num_heads: found 0"),
            ({"num_layers": -1}, "num_layers: found -1"),
            ({"dtype": torch.int8}, "dtype: found torch.int8"),
            ({"common_lm_head": True}, "common_lm_head"),
            ({"vocab_subset_per_head": True}, "vocab_subset_per_head"),
            ({"own_lm_head": True, "vocab_size": None}, "vocab_size: found None"),
            ({"vocab_subset_size": 41}, "vocab_subset_size: found 41, expected 1..vocab_size"),
        ],
    )
    def test_spec(self, fields, words):
        good = {"num_heads": K, "num_layers": 1, "hidden_size": D, "vocab_size": V}
        with pytest.raises(ValueError, match=words):
            HeadSpec(**(good | fields))

    def test_weights_must_match_the_spec(self):
        weight = torch.zeros(1, K, D, D)
        with pytest.raises(ValueError, match=r"HeadWeights.weight: found .*float32.*bfloat16"):
            HeadWeights(HeadSpec(K, 1, D, V), weight)
        spec = HeadSpec(K, 1, D, V, bias=True, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"HeadWeights.bias: found None"):
            HeadWeights(spec, weight)
        with pytest.raises(ValueError, match=r"weights: found HeadSpec"):
            random_heads().load_weights(random_heads(2).to_weights())


def test_counts():
    spec = HeadSpec(5, 1, 4096, 32000, bias=True, own_lm_head=True)
    assert spec.num_parameters == 5 * (4096 * 4096 + 4096 + 32000 * 4096)
    heads = random_heads(own_lm_head=True, bias=True, dtype=torch.float32)
    weights = heads.to_weights()
    assert weights.num_bytes == 4 * weights.spec.num_parameters
    assert sum(p.numel() for p in heads.parameters()) == weights.spec.num_parameters
