"""Heads that score part of the vocabulary through rows cut out of the target's lm_head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_medusa.draft_vocabulary import LEAST_SIZE, cut_lm_head, default_size, later_size
from vllm_medusa.head_weights import HeadSpec, HeadWeights
from vllm_medusa.heads import MedusaHeads

VOCAB, SIZE = 40, 8


def heads_and_target(**fields) -> tuple[HeadWeights, SimpleNamespace]:
    torch.manual_seed(0)
    spec = HeadSpec(3, 1, SIZE, vocab_size=VOCAB, dtype=torch.float32, **fields)
    heads = MedusaHeads(spec)
    torch.nn.init.normal_(heads.weight)
    # vLLM pads the vocabulary of its lm_head.
    lm_head = SimpleNamespace(weight=torch.randn(VOCAB + 24, SIZE))
    return heads.to_weights(), SimpleNamespace(lm_head=lm_head)


def test_first_ids_are_scored_as_the_shared_lm_head_scores_them():
    weights, target = heads_and_target()
    cut = MedusaHeads.from_weights(cut_lm_head(weights, target, 10))
    hidden = torch.randn(5, SIZE)
    first = target.lm_head.weight[:10]
    expected = MedusaHeads.from_weights(weights).top_tokens(hidden, 4, lambda s: s @ first.T)
    assert cut.lm_head.shape == (1, 10, SIZE)
    assert torch.equal(cut.top_tokens(hidden, 4), expected)


def test_subset_of_the_checkpoint_wins():
    weights, target = heads_and_target(vocab_subset_size=6)
    weights.token_map[0] = torch.tensor([39, 3, 17, 2, 30, 11])
    cut = MedusaHeads.from_weights(cut_lm_head(weights, target, 10))
    hidden = torch.randn(5, SIZE)
    whole = target.lm_head.weight[:VOCAB]
    expected = MedusaHeads.from_weights(weights).top_tokens(hidden, 4, lambda s: s @ whole.T)
    assert torch.equal(cut.top_tokens(hidden, 4), expected)


@pytest.mark.parametrize(
    "change",
    ["size None", "size of all", "own lm_heads", "sharded", "int8", "fp8", "bias", "no lm_head"],
)
def test_nothing_is_cut(change):
    weights, target = heads_and_target(own_lm_head=change == "own lm_heads")
    size = {"size None": None, "size of all": VOCAB}.get(change, 10)
    if change == "sharded":
        target.lm_head.weight = target.lm_head.weight[: VOCAB // 2]
    elif change in ("int8", "fp8"):
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[change]
        target.lm_head.weight = target.lm_head.weight.to(dtype)
    elif change == "bias":
        target.lm_head.bias = torch.zeros(VOCAB)
    elif change == "no lm_head":
        del target.lm_head
    assert cut_lm_head(weights, target, size) is weights


@pytest.mark.parametrize(
    ("device", "vocab", "size"),
    [
        ("cpu", 49152, 12288),
        ("cuda", 49152, None),
        ("cuda", 128256, 32064),
        ("cpu", 4 * LEAST_SIZE["cpu"] - 1, None),
        ("xpu", 128256, None),
    ],
)
def test_default_by_device(device, vocab, size):
    assert default_size(device, vocab) == size


@pytest.mark.parametrize(
    ("device", "size", "later"),
    [
        ("cuda", 32064, 16032),
        ("cuda", 253, 127),  # ranks of the largest tree
        ("cuda", 127, 127),
        ("cuda", None, None),
        ("cpu", 12288, None),
    ],
)
def test_later_sequential_heads_score_fewer_ids_on_a_gpu(device, size, later):
    assert later_size(device, size) == later


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("asked", "fields", "message"),
    [
        (200, {}, "the target has 40 ids"),
        (130, {"own_lm_head": True}, "brings an lm_head"),
        (130, {"vocab_subset_size": 6}, "vocabulary subset"),
    ],
)
def test_refused_sizes(asked, fields, message):
    from vllm_medusa.config import MedusaOptions
    from vllm_medusa.start_choices import choose_draft_vocabulary

    weights, _ = heads_and_target(**fields)
    options = MedusaOptions(model="heads", draft_vocab_size=asked)
    with pytest.raises(ValueError, match=message):
        choose_draft_vocabulary(options, weights.spec)


@pytest.mark.parametrize("size", [-1, 1, 62, 1.5, "many"])
def test_impossible_sizes(size):
    from vllm_medusa.config import MedusaOptions

    with pytest.raises(ValueError, match="draft_vocab_size="):
        MedusaOptions(model="heads", draft_vocab_size=size)
