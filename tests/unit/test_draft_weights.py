"""Heads that draft with weights in float8: what is rounded, what it changes, who may."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from vllm_medusa.draft_weights import FLOAT8, Float8Weight, PlainWeight, to_float8_rows
from vllm_medusa.float8_heads import Float8Heads
from vllm_medusa.head_weights import HeadSpec, HeadWeights
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.sequential_heads import SequentialHeads

SIZE, VOCAB = 24, 40
# Of float8's normal numbers, four bits of which one is hidden.
HALF_A_STEP = 2**-4
# Sums of float32 in another order.
SUMS = 1e-5
KINDS = {
    "shared lm_head": {},
    "subset of a shared lm_head": {"vocab_subset_size": 10},
    "own lm_heads": {"own_lm_head": True},
    "common lm_head": {"own_lm_head": True, "common_lm_head": True, "vocab_subset_size": 10},
    "low-rank lm_heads": {"own_lm_head": True, "lm_head_rank": 8},
    "low-rank common lm_head": {"own_lm_head": True, "common_lm_head": True, "lm_head_rank": 8},
}


def random_weights(num_layers: int = 2, bias: bool = True, **fields) -> HeadWeights:
    torch.manual_seed(0)
    spec = HeadSpec(3, num_layers, SIZE, vocab_size=VOCAB, dtype=torch.float32, bias=bias, **fields)
    heads = MedusaHeads(spec).requires_grad_(False)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for token_map in () if heads.token_map is None else heads.token_map:
        token_map.copy_(torch.randperm(VOCAB)[: len(token_map)])
    return heads.to_weights()


def rounded(weights: HeadWeights) -> HeadWeights:
    """The same heads with the numbers that float8 leaves of their matrices."""

    def back(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        numbers, scale = to_float8_rows(tensor)
        return numbers.float() * scale[..., None]

    weight = back(weights.weight) if weights.spec.num_layers else weights.weight
    return HeadWeights(
        weights.spec, weight, weights.bias, back(weights.lm_head), weights.token_map,
        weights.lm_head_down,
    )  # fmt: skip


def assert_close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=SUMS, atol=SUMS * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_rounded_to_their_row(dtype):
    weight = torch.randn(3, 50, 70) * torch.logspace(-4, 3, 50)[:, None]
    weight = weight.to(dtype)
    numbers, scale = to_float8_rows(weight)
    assert (numbers.dtype, scale.dtype) == (FLOAT8, torch.float32)
    assert (numbers.float().abs().amax(-1) == 448).all()
    back, exact = numbers.float() * scale[..., None], weight.float()
    # Below float8's normal numbers, which end 448 * 2**14 below the largest, steps are even.
    even = exact.abs().amax(-1, keepdim=True) / 448 * 2**-10
    assert ((back - exact).abs() <= (exact.abs() * HALF_A_STEP).maximum(even) * (1 + SUMS)).all()


def test_rows_of_zeros_have_the_factor_1():
    numbers, scale = to_float8_rows(torch.zeros(2, 3))
    assert scale.tolist() == [1, 1]
    assert (numbers.float() == 0).all()


@pytest.mark.parametrize("factor", [1.0, 1.4, 1.6, 300.0, 627.0, 1e4])
def test_rows_next_to_the_smallest_float32_stay_finite(factor):
    """Their factor is rounded itself, down to zero."""
    smallest = 2.0**-149
    numbers, scale = to_float8_rows(torch.tensor([[factor * smallest, -factor * smallest]]))
    assert numbers.float().isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(4, 5)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="weight: found NaN or infinity"):
        to_float8_rows(weight)


def test_parts_that_are_rounded_one_after_the_other_are_those_of_the_whole(monkeypatch):
    weight = torch.randn(2, 7, 12)
    whole = to_float8_rows(weight)
    monkeypatch.setattr("vllm_medusa.draft_weights._NUMBERS_AT_ONCE", 40)
    for found, want in zip(to_float8_rows(weight), whole, strict=True):
        assert torch.equal(found.float(), want.float())


@pytest.mark.parametrize("kind", [PlainWeight, Float8Weight])
def test_products_of_a_group(kind):
    weight, inputs = torch.randn(3, 20, SIZE), torch.randn(5, SIZE)
    held = kind(weight)
    if kind is Float8Weight:
        numbers, scale = to_float8_rows(weight)
        weight = numbers.float() * scale[..., None]
    assert_close(held.product(inputs), inputs @ weight[0].T)
    assert_close(held.product(inputs, 2, 11), inputs @ weight[2, :11].T)
    states, bias = torch.randn(5, 20), torch.randn(20)
    want = states + functional.silu(inputs @ weight[1].T + bias)
    assert_close(held.residual(inputs, states, bias, 1), want)
    want = states + functional.silu(inputs @ weight[0].T)
    assert_close(held.residual(inputs, states, None), want)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_independent_heads_compute_what_rounded_ones_do(kind, num_layers, bias):
    weights = random_weights(num_layers, bias, **KINDS[kind])
    table, hidden = torch.randn(VOCAB, SIZE), torch.randn(5, SIZE)

    def apply_lm_head(states: torch.Tensor) -> torch.Tensor:
        return states @ table.T

    found = Float8Heads(weights).draft_logits(hidden, apply_lm_head)
    want = MedusaHeads.from_weights(rounded(weights)).draft_logits(hidden, apply_lm_head)
    assert found.shape == (5, 3, weights.spec.output_size)
    assert_close(found, want)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("later_size", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_sequential_heads_compute_what_rounded_ones_do(kind, later_size, num_layers):
    weights = random_weights(num_layers, sequential=True, **KINDS[kind])
    table = torch.randn(VOCAB, SIZE)
    heads = SequentialHeads(weights, later_size=later_size, kind=Float8Weight)
    plain = SequentialHeads(weights, later_size=later_size)
    # The same numbers, from where they were rounded: a first layer's rows hold several matrices.
    for module, other in zip(heads.modules(), plain.modules(), strict=True):
        if isinstance(module, Float8Weight):
            other.weight = torch.nn.Parameter(module.weight.float() * module.scale[..., None])
    for head in (1, 2, 3):
        inputs = torch.randn(4, 1 + head, SIZE)
        found, want = (h.logits(head, inputs, lambda s: s @ table.T) for h in (heads, plain))
        assert found.shape == (4, heads.size_of(head))
        assert_close(found, want)


@pytest.mark.parametrize("sequential", [False, True], ids=["independent", "sequential"])
def test_every_matrix_takes_a_byte_a_number(sequential):
    weights = random_weights(own_lm_head=True, common_lm_head=True, sequential=sequential)
    if sequential:
        heads = SequentialHeads(weights, kind=Float8Weight)
    else:
        heads = Float8Heads(weights)
    numbers = sum(p.numel() for p in heads.parameters() if p.dtype == FLOAT8)
    others = {name: p for name, p in heads.named_parameters() if p.dtype != FLOAT8}
    assert numbers == weights.spec.num_parameters - weights.bias.numel()
    assert all(name == "bias" or name.endswith(".scale") for name in others)
    assert not any(p.requires_grad for p in heads.parameters())


def test_the_other_kind_of_heads_is_refused():
    with pytest.raises(ValueError, match="heads: found sequential heads"):
        Float8Heads(random_weights(sequential=True))


def test_a_missing_lm_head_is_named():
    with pytest.raises(ValueError, match="apply_lm_head: found None"):
        Float8Heads(random_weights()).draft_logits(torch.randn(2, SIZE))


# -- the option ----------------------------------------------------------------

ADA, AMPERE = 89, 80


def choose(monkeypatch, asked="auto", capability=ADA, dtype=torch.bfloat16, ranks=1, **fields):
    """What a start chooses on an NVIDIA GPU of a compute capability, or on none (None)."""
    from vllm_medusa import start_choices
    from vllm_medusa.config import MedusaOptions

    platform = SimpleNamespace(
        is_cuda=lambda: capability is not None,
        has_device_capability=lambda least: capability >= least,
    )
    monkeypatch.setattr(start_choices, "current_platform", platform)
    return start_choices.choose_draft_weights(
        MedusaOptions("heads", draft_weights=asked), HeadSpec(3, 1, SIZE, **fields), dtype,
        SimpleNamespace(tensor_parallel_size=ranks),
    )  # fmt: skip


PLACES = {
    "Ada": ({}, None),
    "float16": ({"dtype": torch.float16}, None),
    "sequential heads on two ranks": ({"ranks": 2, "sequential": True}, None),
    "no NVIDIA GPU": ({"capability": None}, "needs an NVIDIA GPU .* 8.9 or later"),
    "Ampere": ({"capability": AMPERE}, "needs an NVIDIA GPU .* 8.9 or later"),
    "float32": ({"dtype": torch.float32}, "the target's are torch.float32"),
    "two ranks": ({"ranks": 2}, "with tensor_parallel_size=2 each rank holds a part"),
}


@pytest.mark.vllm
@pytest.mark.parametrize("place", PLACES)
def test_float8_where_it_can_be(monkeypatch, place):
    options, reason = PLACES[place]
    assert choose(monkeypatch, **options) == (reason is None)
    assert not choose(monkeypatch, "unquantised", **options)
    if reason is None:
        assert choose(monkeypatch, "float8", **options)
        return
    with pytest.raises(ValueError, match=f"draft_weights='float8': .*{reason}"):
        choose(monkeypatch, "float8", **options)


@pytest.mark.parametrize("value", ["fp8", "", None, True])
def test_other_values_are_refused(value):
    from vllm_medusa.config import MedusaOptions

    with pytest.raises(ValueError, match=r"draft_weights=.* must be one of auto, float8"):
        MedusaOptions("heads", draft_weights=value)
