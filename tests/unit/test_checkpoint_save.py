"""Writing and converting: bit-exact where a format has room, refused where not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from safetensors import safe_open
from synthetic_checkpoints import SUBSET, D, K, Parts, V, medusa_config, write

from vllm_medusa.checkpoint import (
    CheckpointError,
    HeadSpec,
    HeadWeights,
    convert_heads,
    load_heads,
    save_heads,
)
from vllm_medusa.checkpoint_save import SAVE_FORMATS
from vllm_medusa.head_weights import TENSORS

LETTER = {"A-safetensors": "C1"} | {name: name for name in SAVE_FORMATS if name != "A-safetensors"}

# Every kind of heads, and the formats with room for it.
KINDS = {
    "own": ({"own_lm_head": True}, {"A-safetensors", "C1", "D", "G", "M"}),
    "own, bias": ({"own_lm_head": True, "bias": True}, {"A-safetensors", "C1", "D", "G", "M"}),
    "own, 2 layers": (
        {"own_lm_head": True, "num_layers": 2},
        {"A-safetensors", "C1", "D", "G", "M"},
    ),
    "own, no layers": ({"own_lm_head": True, "num_layers": 0}, {"A-safetensors", "C1", "D", "G"}),
    "own, subset": ({"own_lm_head": True, "bias": True, "subset": 1}, {"D", "F", "G", "M"}),
    "common": ({"own_lm_head": True, "common_lm_head": True}, {"D", "G", "M"}),
    "common, subset": (
        {"own_lm_head": True, "common_lm_head": True, "subset": 1},
        {"D", "G", "M"},
    ),
    "shared": ({"bias": True}, {"C2", "G"}),
    "shared, 2 layers": ({"bias": True, "num_layers": 2}, {"C2", "G"}),
    "shared, subset": ({"subset": 1}, {"G", "M"}),
    "shared, no layers": ({"num_layers": 0}, set()),
    "subset per head": ({"own_lm_head": True, "subset": K}, {"M"}),
    "low rank": ({"own_lm_head": True, "lm_head_rank": 2}, {"M"}),
    "low rank, common": (
        {"own_lm_head": True, "common_lm_head": True, "lm_head_rank": 2, "bias": True},
        {"M"},
    ),
    "low rank, subset": ({"own_lm_head": True, "lm_head_rank": 2, "subset": 1}, {"M"}),
    "sequential": ({"sequential": True, "bias": True, "num_layers": 2}, {"M"}),
    "sequential, own": ({"sequential": True, "own_lm_head": True}, {"M"}),
}


def make_weights(num_layers=1, subset=0, dtype=torch.bfloat16, **fields) -> HeadWeights:
    spec = HeadSpec(
        K, num_layers, D, V, dtype=dtype,
        vocab_subset_size=len(SUBSET) if subset else None,
        vocab_subset_per_head=subset == K,
        **fields,
    )

    def rand(*shape):
        return torch.randn(shape).to(dtype)

    return HeadWeights(
        spec,
        weight=rand(num_layers, K, D, D),
        bias=rand(num_layers, K, D) if spec.bias else None,
        lm_head=rand(spec.num_lm_heads, spec.output_size, spec.lm_head_width)
        if spec.own_lm_head
        else None,
        lm_head_down=rand(K, spec.lm_head_rank, D) if spec.lm_head_rank else None,
        path_weight=rand(spec.num_path_weights, D, D) if spec.sequential else None,
        token_map=torch.tensor(SUBSET).repeat(subset, 1) if subset else None,
        metadata={"base_model_name_or_path": "maker/base-7b"},
    )


def assert_same(found: HeadWeights, expected: HeadWeights) -> None:
    assert found.spec == expected.spec
    for name in TENSORS:
        left, right = getattr(found, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype and torch.equal(left, right), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_every_pair(tmp_path, kind, dtype):
    fields, formats = KINDS[kind]
    weights = make_weights(**fields, dtype=dtype)
    for first, second in itertools.product(sorted(formats), repeat=2):
        saved = tmp_path / f"{first}-{second}"
        save_heads(weights, saved, first)
        loaded = load_heads(saved, vocab_size=V)
        assert loaded.format == LETTER[first]
        assert loaded.metadata["base_model_name_or_path"] == "maker/base-7b"
        assert_same(loaded, weights)
        convert_heads(loaded, saved / "converted", second)
        converted = load_heads(saved / "converted", hidden_size=D, vocab_size=V)
        assert converted.format == LETTER[second]
        assert_same(converted, weights)


@pytest.mark.parametrize("kind", KINDS)
def test_other_formats_say_what_would_be_lost(tmp_path, kind):
    fields, formats = KINDS[kind]
    for format in SAVE_FORMATS.keys() - formats:
        with pytest.raises(CheckpointError, match="found heads with ") as caught:
            save_heads(make_weights(**fields), tmp_path / format, format)
        remedy = ", ".join(sorted(formats)) + " would hold them" if formats else "no format"
        assert f"heads that format {format} can hold; {remedy}" in str(caught.value)
        assert not (tmp_path / format).exists(), "refused before anything is written"


@pytest.mark.parametrize(
    ("kind", "format", "loss"),
    [
        ("own", "C2", "own lm_heads (the format shares the base model's)"),
        ("shared", "D", "no own lm_heads"),
        ("shared", "C1", "no own lm_heads"),
        ("own, subset", "C1", "a token map"),
        ("own", "F", "no token map"),
        ("common", "C1", "one own lm_head for all heads"),
        ("subset per head", "D", "a token map per head"),
    ],
)
def test_losses_by_name(tmp_path, kind, format, loss):
    with pytest.raises(CheckpointError) as caught:
        save_heads(make_weights(**KINDS[kind][0]), tmp_path, format)
    assert loss in str(caught.value)


def test_unsorted_token_map_survives_g(tmp_path):
    weights = make_weights(own_lm_head=True, subset=1)
    weights = dataclasses.replace(weights, token_map=weights.token_map.flip(1))
    save_heads(weights, tmp_path, "G")
    assert_same(load_heads(tmp_path), weights)


def test_unknown_vocabulary_cannot_be_written_for_vllm(tmp_path):
    weights = make_weights(bias=True)
    spec = dataclasses.replace(weights.spec, vocab_size=None)
    weights = dataclasses.replace(weights, spec=spec)
    with pytest.raises(CheckpointError, match="unknown vocabulary size"):
        save_heads(weights, tmp_path, "G")
    save_heads(weights, tmp_path, "C2")
    assert_same(load_heads(tmp_path), weights)


@pytest.mark.parametrize("special", [-0.0, 6.1e-39, -3.3e38])
def test_bits_survive(tmp_path, special):
    weights = make_weights(dtype=torch.float32)
    weights.weight[0, 0, 0, 0] = special
    save_heads(weights, tmp_path)
    bits = load_heads(tmp_path).weight.view(torch.int32)
    assert torch.equal(bits, weights.weight.view(torch.int32))


def test_names_that_each_reader_wants(tmp_path):
    save_heads(make_weights(bias=True), tmp_path / "c2", "C2", {"note": 1})
    config = json.loads((tmp_path / "c2/config.json").read_text())
    assert config["version"] == "2" and config["note"] == 1
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (K, 1)
    with safe_open(tmp_path / "c2/medusa_lm_head.safetensors", "pt") as file:
        assert {"0.0.linear.weight", "2.0.linear.bias"} < set(file.keys())
        assert len(file.keys()) == 2 * K

    save_heads(make_weights(own_lm_head=True, subset=1), tmp_path / "d", "D")
    config = json.loads((tmp_path / "d/config.json").read_text())
    wanted = {
        "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": D,
        "vocab_size": V, "truncated_vocab_size": len(SUBSET), "num_heads": K,
        "num_hidden_layers": 1, "medusa_fc_bias": False, "original_lm_head": False,
    }
    assert wanted.items() <= config.items()
    with safe_open(tmp_path / "d/model.safetensors", "pt") as file:
        assert {"blocks.0.layers.0.weight", "lm_heads.2.weight", "token_map"} < set(file.keys())


def test_a_pickle_becomes_safetensors_with_its_tree(tmp_path):
    parts = Parts()
    write(tmp_path / "a", "medusa_lm_head.pt", parts.nested(), medusa_config())
    (tmp_path / "a/tree.json").write_text("[[0], [1]]")
    target = convert_heads(load_heads(tmp_path / "a"), tmp_path / "c", "A-safetensors")
    assert target.name == "medusa_lm_head.safetensors"
    assert load_heads(tmp_path / "c").tree_path.read_text() == "[[0], [1]]"
    with safe_open(target, "pt") as file:
        assert set(file.keys()) == set(parts.nested())
        for key, tensor in parts.nested().items():
            assert torch.equal(file.get_tensor(key), tensor)


def test_saving_again_replaces_the_file(tmp_path):
    save_heads(make_weights(), tmp_path)
    second = make_weights()
    save_heads(second, tmp_path)
    assert_same(load_heads(tmp_path), second)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json", "medusa_lm_head.safetensors",
    ]


def test_two_formats_in_one_directory_are_refused(tmp_path):
    save_heads(make_weights(own_lm_head=True), tmp_path, "C1")
    with pytest.raises(CheckpointError, match=r"other weights .medusa_lm_head\.safetensors"):
        save_heads(make_weights(own_lm_head=True), tmp_path, "D")


def test_the_source_is_never_overwritten(tmp_path):
    save_heads(make_weights(own_lm_head=True), tmp_path, "C1")
    with pytest.raises(CheckpointError, match="the source's own directory"):
        convert_heads(load_heads(tmp_path), tmp_path / ".." / tmp_path.name, "C1")


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"format: found 'B', expected one of A-safetensors"):
        save_heads(make_weights(), tmp_path, "B")


def test_heads_that_the_formats_own_program_cannot_read_warn(tmp_path, caplog):
    save_heads(make_weights(num_layers=2), tmp_path / "c2", "C2")
    assert "TGI reads one layer only" in caplog.text
    save_heads(make_weights(own_lm_head=True), tmp_path / "d", "D")
    assert "vLLM 0.32's own loader" not in caplog.text
    save_heads(make_weights(own_lm_head=True, subset=1), tmp_path / "subset", "D")
    assert "vLLM 0.32's own loader" in caplog.text


def test_tied_layers_are_written_out(tmp_path):
    weights = make_weights(num_layers=2)
    weights.weight[1] = weights.weight[0]
    target = save_heads(weights, tmp_path, "C2")
    assert_same(load_heads(tmp_path), weights)
    assert target.stat().st_size > 2 * math.prod((2, K, D, D))
