"""Every published format loads to the same weights, told from its keys."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from synthetic_checkpoints import (
    SUBSET,
    D,
    K,
    Parts,
    V,
    fp8_export,
    medusa_config,
    vllm_config,
    write,
    write_sharded,
)

from vllm_medusa.checkpoint import HeadWeights, load_heads

BASE_TENSORS = {
    "model.embed_tokens.weight": torch.zeros(V, D),
    "model.layers.0.self_attn.q_proj.weight": torch.zeros(D, D),
    "lm_head.weight": torch.zeros(V, D),
}


def assert_layers(weights: HeadWeights, parts: Parts, *, bias: bool) -> None:
    for head in range(parts.num_heads):
        for layer in range(parts.num_layers):
            assert torch.equal(weights.weight[layer, head], parts.weights[head][layer])
            if bias:
                assert torch.equal(weights.bias[layer, head], parts.biases[head][layer])
    assert weights.spec.bias is bias is (weights.bias is not None)
    assert weights.spec.num_layers == parts.num_layers
    assert weights.spec.num_heads == parts.num_heads


def assert_lm_heads(weights: HeadWeights, expected: list[torch.Tensor]) -> None:
    assert weights.spec.own_lm_head
    assert torch.equal(weights.lm_head, torch.stack(expected))


def test_a_pickle_with_wrong_config_trusts_the_file_and_warns(tmp_path, caplog):
    parts = Parts(num_heads=5)
    write(tmp_path, "medusa_lm_head.pt", parts.nested(), medusa_config(num_heads=2))
    weights = load_heads(tmp_path, hidden_size=D, vocab_size=V)
    assert weights.format == "A"
    assert_layers(weights, parts, bias=True)
    assert_lm_heads(weights, parts.lm_heads)
    assert weights.spec.dtype == torch.bfloat16
    assert "medusa_num_heads = 2, the file holds 5" in caplog.text
    assert "is a pickle" in caplog.text and "vllm-medusa convert" in caplog.text


def test_b_sharded_model_reads_only_shards_with_heads(tmp_path):
    parts = Parts()
    config = {"model_type": "llama", "hidden_size": D, "vocab_size": V, "num_hidden_layers": 32}
    directory = write_sharded(
        tmp_path,
        {
            "model-00001-of-00002.safetensors": BASE_TENSORS,
            "model-00002-of-00002.safetensors": parts.nested("medusa_head."),
        },
        config | {"medusa_num_heads": K, "medusa_num_layers": 1},
    )
    # Proof of laziness: the base model's shard is not even there.
    (directory / "model-00001-of-00002.safetensors").unlink()
    weights = load_heads(directory)
    assert weights.format == "B"
    assert_layers(weights, parts, bias=True)
    assert_lm_heads(weights, parts.lm_heads)
    assert [file.name for file in weights.source_files] == ["model-00002-of-00002.safetensors"]


def test_b_whole_model_in_one_pickle(tmp_path):
    parts = Parts()
    write(tmp_path, "pytorch_model.bin", BASE_TENSORS | parts.nested("medusa_head."))
    weights = load_heads(tmp_path)
    assert weights.format == "B"
    assert_layers(weights, parts, bias=True)


def test_c1(tmp_path):
    parts = Parts(dtype=torch.float16)
    write(tmp_path, "medusa_lm_head.safetensors", parts.nested(), medusa_config())
    weights = load_heads(tmp_path, base_model="/models/base-7b")
    assert weights.format == "C1"
    assert weights.metadata["base_model_name_or_path"] == "maker/base-7b"
    assert_layers(weights, parts, bias=True)
    assert_lm_heads(weights, parts.lm_heads)
    assert (weights.spec.dtype, weights.spec.vocab_size) == (torch.float16, V)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_c2_beside_an_adapter_and_a_tree(tmp_path, num_layers):
    parts = Parts(num_layers=num_layers)
    tensors = parts.nested(lm_heads=False)
    write(tmp_path, "medusa_lm_head.safetensors", tensors, medusa_config(version="2"))
    write(tmp_path, "adapter_model.safetensors", {"base_model.x.lora_A.weight": torch.zeros(2)})
    (tmp_path / "tree.json").write_text("[[0]]")
    weights = load_heads(tmp_path, vocab_size=V)
    assert weights.format == "C2"
    assert_layers(weights, parts, bias=True)
    assert weights.lm_head is None and not weights.spec.own_lm_head
    assert weights.spec.vocab_size == V
    assert weights.tree_path == tmp_path / "tree.json"


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("bias", [False, True])
def test_d(tmp_path, prefix, bias):
    parts = Parts()
    tensors = parts.flat(prefix, bias=bias)
    write(tmp_path, "model.safetensors", tensors, vllm_config(medusa_fc_bias=bias))
    weights = load_heads(tmp_path, vocab_size=V)
    assert weights.format == "D"
    assert_layers(weights, parts, bias=bias)
    assert_lm_heads(weights, parts.lm_heads)


@pytest.mark.parametrize("rows", [len(SUBSET), V], ids=["cut lm_heads", "full lm_heads"])
def test_d_token_map(tmp_path, rows):
    parts = Parts(rows=rows)
    tensors = parts.flat() | {"token_map": torch.tensor(SUBSET)}
    write(tmp_path, "model.safetensors", tensors, vllm_config(truncated_vocab_size=len(SUBSET)))
    weights = load_heads(tmp_path)
    assert weights.token_map.tolist() == [list(SUBSET)]
    assert (weights.spec.vocab_size, weights.spec.output_size) == (V, len(SUBSET))
    kept = list(SUBSET) if rows == V else list(range(rows))
    assert_lm_heads(weights, [lm_head[kept] for lm_head in parts.lm_heads])


def test_d_one_lm_head_for_all(tmp_path):
    parts = Parts()
    tensors = parts.flat(lm_heads=False) | {"lm_heads.0.weight": parts.lm_heads[0]}
    write(tmp_path, "model.safetensors", tensors, vllm_config(original_lm_head=True))
    weights = load_heads(tmp_path)
    assert weights.spec.common_lm_head
    assert_lm_heads(weights, parts.lm_heads[:1])


def test_e2_fp8_is_dequantised(tmp_path):
    parts = Parts(dtype=torch.float32)
    tensors, exact = fp8_export(parts)
    config = {"model_type": "llama", "medusa": {"num_medusa_heads": K, "num_medusa_layers": 1}}
    write_sharded(
        tmp_path,
        {"model-1.safetensors": BASE_TENSORS, "model-2.safetensors": tensors},
        config,
    )
    weights = load_heads(tmp_path, dtype=torch.float32)
    assert weights.format == "E2" and weights.metadata["dequantised"]
    for head in range(K):
        assert torch.equal(weights.weight[0, head], exact[f"medusa_heads.{head}.0.linear.weight"])
        assert torch.equal(weights.lm_head[head], exact[f"medusa_heads.{head}.1.weight"])
    assert load_heads(tmp_path).spec.dtype == torch.bfloat16


def test_e2_scale_per_row(tmp_path):
    weight = torch.tensor([[1.0, 2.0], [4.0, -8.0]]).to(torch.float8_e4m3fn)
    tensors = {
        "medusa_heads.0.0.linear.weight": weight,
        "medusa_heads.0.0.linear.weight_scale": torch.tensor([0.5, 2.0]),
    }
    write(tmp_path, "model.safetensors", tensors)
    weights = load_heads(tmp_path, dtype=torch.float32)
    assert weights.weight[0, 0].tolist() == [[0.5, 1.0], [8.0, -16.0]]


def test_f_remap_holds_base_ids(tmp_path):
    parts = Parts(rows=len(SUBSET))
    tensors = parts.nested() | {"token_id_remap": torch.tensor(SUBSET, dtype=torch.int32)}
    write(tmp_path, "medusa_lm_head.pt", tensors)
    weights = load_heads(tmp_path, vocab_size=V)
    assert weights.format == "F"
    assert weights.token_map.tolist() == [list(SUBSET)]
    assert_lm_heads(weights, parts.lm_heads)


@pytest.mark.parametrize("maps", [("t2d", "d2t"), ("d2t",), ("t2d",)])
def test_g_draft_to_target_holds_offsets(tmp_path, maps):
    parts = Parts(rows=len(SUBSET))
    ids = torch.tensor(SUBSET)
    mask = torch.zeros(V, dtype=torch.bool)
    mask[ids] = True
    both = {"t2d": mask, "d2t": ids - torch.arange(len(SUBSET))}
    tensors = parts.flat() | {name: both[name] for name in maps}
    write(tmp_path, "model.safetensors", tensors, {"medusa_vocab_size": V, "num_heads": K})
    weights = load_heads(tmp_path)
    assert weights.format == "G"
    assert weights.token_map.tolist() == [list(SUBSET)]
    assert weights.spec.vocab_size == V


def test_g_with_the_verifiers_lm_head(tmp_path):
    parts = Parts()
    config = {"speculators_model_type": "medusa", "original_lm_head": True}
    write(tmp_path, "model.safetensors", parts.flat(lm_heads=False), config)
    weights = load_heads(tmp_path)
    assert weights.format == "G" and not weights.spec.own_lm_head


def test_tied_layers_written_once(tmp_path, caplog):
    # FasterDecoding repeats one module: safetensors keeps layer 0 only, while the
    # lm_head's number still counts both.
    parts = Parts()
    tensors = {
        key.replace(".1.weight", ".2.weight"): value for key, value in parts.nested().items()
    }
    write(tmp_path, "medusa_lm_head.safetensors", tensors, medusa_config(num_layers=2))
    weights = load_heads(tmp_path)
    assert weights.spec.num_layers == 2 and weights.metadata["tied_layers"]
    for layer in range(2):
        for head in range(K):
            assert torch.equal(weights.weight[layer, head], parts.weights[head][0])
            assert torch.equal(weights.bias[layer, head], parts.biases[head][0])
    assert "2 tied layers" in caplog.text


def test_no_layers(tmp_path):
    parts = Parts(num_layers=0)
    write(tmp_path, "medusa_lm_head.safetensors", parts.nested(), medusa_config(num_layers=0))
    weights = load_heads(tmp_path)
    assert weights.spec.num_layers == 0 and weights.weight.shape == (0, K, D, D)
    assert_lm_heads(weights, parts.lm_heads)


def test_file_path_and_missing_config(tmp_path):
    write(tmp_path, "heads.safetensors", Parts().nested(lm_heads=False))
    assert load_heads(tmp_path / "heads.safetensors").format == "C2"
    assert load_heads(tmp_path).format == "C2"  # the only weights file there


def test_dtype_is_converted(tmp_path):
    parts = Parts(dtype=torch.float32)
    write(tmp_path, "medusa_lm_head.safetensors", parts.nested())
    weights = load_heads(tmp_path, dtype=torch.float16)
    assert torch.equal(weights.weight[0, 1], parts.weights[1][0].half())


def test_head_for_another_base_of_the_same_shape_warns(tmp_path, caplog):
    write(tmp_path, "medusa_lm_head.safetensors", Parts().nested(), medusa_config())
    load_heads(tmp_path, base_model="other/base-8b")
    assert "trained for 'maker/base-7b', they are used with 'other/base-8b'" in caplog.text


@pytest.mark.parametrize("recorded", ["N/A", "", None])
def test_unknown_base_does_not_warn(tmp_path, caplog, recorded):
    config = medusa_config() | {"base_model_name_or_path": recorded}
    write(tmp_path, "medusa_lm_head.safetensors", Parts().nested(), config)
    load_heads(tmp_path, base_model="other/base-8b")
    assert not [item for item in caplog.records if item.levelno >= logging.WARNING]


@pytest.mark.parametrize("listed", ["heads", "shards", "pickle"])
def test_hub_id_downloads_no_more_than_needed(tmp_path, monkeypatch, listed):
    import huggingface_hub

    remote = tmp_path / "remote"
    if listed == "heads":
        write(remote, "medusa_lm_head.safetensors", Parts().nested(), medusa_config())
    elif listed == "pickle":
        write(remote, "heads.pt", Parts().nested(), medusa_config())
    else:
        shards = {"m1.safetensors": BASE_TENSORS, "m2.safetensors": Parts().nested("medusa_head.")}
        write_sharded(remote, shards, {})
    cache = tmp_path / "cache"
    cache.mkdir()
    asked = []

    def fake_download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        for pattern in allow_patterns:
            for file in remote.glob(pattern):
                (cache / file.name).write_bytes(file.read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake_download)
    weights = load_heads("owner/name@refs/pr/1")
    assert weights.spec.num_heads == K
    assert set(asked) == {("owner/name", "refs/pr/1")}
    assert not (cache / "m1.safetensors").exists()


def test_config_of_a_whole_model_is_not_taken_for_the_heads(tmp_path, caplog):
    config = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    write(tmp_path, "model.safetensors", BASE_TENSORS | Parts().nested("medusa_head."), config)
    assert load_heads(tmp_path).spec.num_heads == K
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert not [item for item in caplog.records if item.levelno >= logging.WARNING]
