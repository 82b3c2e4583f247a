"""What cannot be right is refused, with file, key, found, expected and remedy."""

from __future__ import annotations

import pickle

import pytest
import torch
from synthetic_checkpoints import D, K, Parts, V, medusa_config, vllm_config, write

from vllm_medusa.checkpoint import CheckpointError, load_heads

FILE = "medusa_lm_head.safetensors"


def refused(path, *words: str, **arguments) -> CheckpointError:
    """Load, expect CheckpointError, and look for ``words`` in its one-line message."""
    with pytest.raises(CheckpointError) as caught:
        load_heads(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, "found", "expected", ";"):
        assert word in message, message
    return caught.value


def write_c1(directory, change=None, **parts):
    tensors = Parts(**parts).nested()
    if change:
        change(tensors)
    return write(directory, FILE, tensors, medusa_config())


def test_wrong_hidden_size_names_the_other_base(tmp_path):
    write_c1(tmp_path)
    error = refused(
        tmp_path, FILE, "0.0.linear.weight", "hidden size 8", "16", "maker/base-7b", "my/base",
        hidden_size=16, base_model="my/base",
    )
    assert error.key == "0.0.linear.weight" and error.file == tmp_path / FILE


def test_wrong_vocabulary(tmp_path):
    write_c1(tmp_path)
    refused(tmp_path, "0.1.weight", f"vocabulary of {V}", "32000", "token_map", vocab_size=32000)


def test_integers(tmp_path):
    write_c1(tmp_path, lambda t: t.update({"1.0.linear.weight": torch.ones(D, D).int()}))
    refused(tmp_path, "1.0.linear.weight", "torch.int32", "bfloat16")


@pytest.mark.parametrize(
    "shape", [(), (0, D), (D + 1, D)], ids=["no dimension", "no rows", "more rows than columns"]
)
def test_impossible_rank(tmp_path, shape):
    tensors = Parts().nested(lm_heads=False) | {"lm_head.weight": torch.ones(V, 2).bfloat16()}
    tensors |= {f"{head}.lm_head_down.weight": torch.ones(shape).bfloat16() for head in range(K)}
    write(tmp_path, FILE, tensors)
    refused(tmp_path, "0.lm_head_down.weight", f"shape {list(shape)}", "rank")


def test_path_matrices_without_layers(tmp_path):
    tensors = {"0.lm_head.weight": torch.ones(V, D), "0.path.0.weight": torch.ones(D, D)}
    write(tmp_path, FILE, tensors)
    refused(tmp_path, "0.0.linear.weight", "path matrices without a layer")


def test_low_rank_without_layers_tells_the_hidden_size(tmp_path):
    down = {"0.lm_head.weight": torch.ones(V, 2), "0.lm_head_down.weight": torch.ones(2, D)}
    write(tmp_path, FILE, down)
    assert load_heads(tmp_path, hidden_size=D).spec.lm_head_rank == 2


def test_a_file_too_large_for_json(tmp_path):
    write_c1(tmp_path)
    with (tmp_path / "config.json").open("r+") as file:
        file.truncate(1 << 40)
    refused(tmp_path, "config.json", str(1 << 40), "at most")


@pytest.mark.parametrize("key", ["1.lm_head_down.weight", "1.path.1.weight"])
def test_integers_of_our_own_format(tmp_path, key):
    tensors = Parts().nested(lm_heads=False) | {"lm_head.weight": torch.ones(V, 2).bfloat16()}
    down = torch.ones(2, D).bfloat16()
    tensors |= {f"{head}.lm_head_down.weight": down.clone() for head in range(K)}
    paths = [(head, place) for head in range(K) for place in range(head + 1)]
    tensors |= {f"{h}.path.{p}.weight": torch.ones(D, D).bfloat16() for h, p in paths}
    write(tmp_path, FILE, tensors)
    assert load_heads(tmp_path).spec.lm_head_rank == 2
    write(tmp_path, FILE, tensors | {key: tensors[key].int()})
    refused(tmp_path, key, "torch.int32")


def test_fp8_without_scale(tmp_path):
    write_c1(
        tmp_path,
        lambda t: t.update({"1.0.linear.weight": torch.ones(D, D).to(torch.float8_e4m3fn)}),
    )
    refused(tmp_path, "1.0.linear.weight_scale")


def test_mixed_dtypes_need_a_choice(tmp_path):
    write_c1(tmp_path, lambda t: t.update({"0.1.weight": torch.ones(V, D)}))
    refused(tmp_path, "0.1.weight", "float32", "bfloat16", "--dtype")
    assert load_heads(tmp_path, dtype=torch.float32).spec.dtype == torch.float32


@pytest.mark.parametrize(
    "key",
    ["1.0.linear.weight", "1.0.linear.bias", "1.1.weight", "0.0.linear.weight"],
)
def test_missing_tensor(tmp_path, key):
    write_c1(tmp_path, lambda t: t.pop(key))
    assert refused(tmp_path, key).key == key


def test_missing_head_index(tmp_path):
    write_c1(tmp_path, lambda t: [t.pop(key) for key in list(t) if key.startswith("1.")])
    refused(tmp_path, "1.0.linear.weight", "3 heads")


def test_missing_layer(tmp_path):
    write_c1(
        tmp_path,
        lambda t: [t.pop(key) for key in list(t) if ".1.linear" in key],
        num_layers=3,
    )
    refused(tmp_path, "0.1.linear.weight", "3 layers")


def test_missing_last_layer_of_three(tmp_path):
    write_c1(
        tmp_path,
        lambda t: [t.pop(key) for key in list(t) if ".2.linear" in key],
        num_layers=3,
    )
    refused(tmp_path, "0.2.linear.weight")


def test_lm_head_in_the_place_of_a_layer(tmp_path):
    tensors = Parts(num_layers=2).nested(lm_heads=False)
    tensors |= {f"{head}.1.weight": torch.ones(V, D).bfloat16() for head in range(K)}
    write(tmp_path, FILE, tensors)
    refused(tmp_path, "0.2.weight", "lm_heads at position 1")


@pytest.mark.parametrize("key", ["extra.weight", "0.0.gate.weight", "0.1.bias", "0.9.weight_scale"])
def test_extra_key(tmp_path, key):
    write_c1(tmp_path, lambda t: t.update({key: torch.ones(2)}))
    assert refused(tmp_path, key).key == key


def test_extra_key_vllm(tmp_path):
    tensors = Parts().flat() | {"blocks.0.norm.weight": torch.ones(D)}
    write(tmp_path, "model.safetensors", tensors, vllm_config())
    refused(tmp_path, "blocks.0.norm.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["2.0.linear.weight", "2.0.linear.bias", "2.1.weight"])
def test_nan_or_inf(tmp_path, key, value):
    def poison(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[3] = value

    write_c1(tmp_path, poison)
    refused(tmp_path, key, "1 NaN or Inf")


def test_overflow_of_the_wanted_dtype(tmp_path):
    write_c1(tmp_path, lambda t: t["0.1.weight"].fill_(1e6))
    refused(tmp_path, "0.1.weight", "float16", dtype=torch.float16)


def test_wrong_shape_of_one_head(tmp_path):
    write_c1(tmp_path, lambda t: t.update({"1.0.linear.weight": torch.ones(D, D + 1).bfloat16()}))
    refused(tmp_path, "1.0.linear.weight", "[8, 9]", "[8, 8]")


def test_truncated_file(tmp_path):
    path = write_c1(tmp_path) / FILE
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, FILE, "truncated")


def test_file_that_is_no_safetensors(tmp_path):
    (tmp_path / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, FILE, "damaged")


def test_truncated_pickle(tmp_path):
    path = write(tmp_path, "medusa_lm_head.pt", Parts().nested()) / "medusa_lm_head.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    refused(tmp_path, "medusa_lm_head.pt")


class Payload:
    """Stands for code in a pickle."""


def test_pickle_with_code_is_not_executed(tmp_path):
    torch.save({"0.0.linear.weight": Payload()}, tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, "medusa_lm_head.pt", "cannot be read safely")
    (tmp_path / "medusa_lm_head.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    refused(tmp_path, "medusa_lm_head.pt", "cannot be read safely")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"0.0.linear.weight": 3}])
def test_pickle_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    refused(tmp_path, "medusa_lm_head.pt", "state dict")


def test_empty_directory(tmp_path):
    refused(tmp_path, str(tmp_path), "medusa_lm_head.safetensors")


def test_two_unknown_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path, name, Parts().nested())
    refused(tmp_path, "a.safetensors", "b.safetensors", "path of the weights file")


def test_no_such_path(tmp_path):
    refused(tmp_path / "nowhere", "no such file", "hub id")


def test_other_suffix(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", ".txt")


def test_offline_hub(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("owner/name", "ConnectionError: no route to host", "give the directory")


def test_shard_that_is_missing(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"medusa_head.0.0.linear.weight": "gone.safetensors"}}'
    )
    refused(tmp_path, "gone.safetensors", "download the checkpoint again")


def test_index_that_names_an_absent_tensor(tmp_path):
    write(tmp_path, "m.safetensors", {"x": torch.ones(1)})
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"medusa_head.0.0.linear.weight": "m.safetensors"}}'
    )
    refused(tmp_path, "m.safetensors", "medusa_head.0.0.linear.weight")


def test_broken_config(tmp_path):
    write_c1(tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "unreadable JSON")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["0.hydra_mlp.linear.weight", "0.hydra_lm_head.weight"], "Hydra"),
        (["0.0.linear.weight", "0.0.res_connection.weight"], "Hydra"),
        (["fc.weight", "layers.0.self_attn.q_proj.weight", "embed_tokens.weight"], "EAGLE"),
        (["midlayer.self_attn.q_proj.weight", "d2t", "t2d", "norm.weight"], "EAGLE"),
        (["base_model.model.medusa_head.0.0.linear.weight"], "PEFT"),
        (["model.layers.0.mlp.up_proj.weight"], "without a Medusa head"),
    ],
)
def test_other_kinds_of_checkpoint_by_name(tmp_path, keys, name):
    write(tmp_path, "model.safetensors", {key: torch.ones(D, D) for key in keys})
    refused(tmp_path, name)


def test_vllm_without_lm_heads(tmp_path):
    write(tmp_path, "model.safetensors", Parts().flat(lm_heads=False), vllm_config())
    refused(tmp_path, "lm_heads.0.weight")


def test_vllm_with_one_lm_head_of_three(tmp_path):
    tensors = Parts().flat(lm_heads=False) | {"lm_heads.0.weight": torch.ones(V, D).bfloat16()}
    write(tmp_path, "model.safetensors", tensors, vllm_config())
    refused(tmp_path, "lm_heads.1.weight", "original_lm_head")


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        (torch.tensor([0, 1, V]), f"0..{V}"),
        (torch.tensor([-1, 1, 2]), "-1..2"),
        (torch.tensor([1, 1, 2]), "twice"),
        (torch.tensor([0.0, 1.0, 2.0]), "float32"),
        (torch.tensor([[0, 1, 2], [0, 1, 3]]), "2 rows"),
        (torch.tensor([0, 1]), "3 rows"),
    ],
)
def test_bad_token_map(tmp_path, ids, word):
    tensors = Parts(rows=3).nested() | {"token_id_remap": ids}
    write(tmp_path, FILE, tensors)
    refused(tmp_path, word, vocab_size=V)


def test_contradicting_speculators_maps(tmp_path):
    mask = torch.zeros(V, dtype=torch.bool)
    mask[:3] = True
    tensors = Parts(rows=3).flat() | {"t2d": mask, "d2t": torch.tensor([0, 0, 4])}
    write(tmp_path, "model.safetensors", tensors)
    refused(tmp_path, "d2t", "t2d")


def test_vocabulary_stated_by_the_mask(tmp_path):
    mask = torch.zeros(V, dtype=torch.bool)
    mask[:3] = True
    write(tmp_path, "model.safetensors", Parts(rows=3).flat() | {"t2d": mask})
    refused(tmp_path, "t2d", f"vocabulary of {V}", vocab_size=V + 1)


def test_two_token_maps(tmp_path):
    tensors = Parts(rows=3).flat() | {"token_map": torch.arange(3), "d2t": torch.zeros(3).long()}
    write(tmp_path, "model.safetensors", tensors)
    refused(tmp_path, "several token maps")


def test_wanted_dtype_must_be_floating_point(tmp_path):
    write_c1(tmp_path)
    with pytest.raises(ValueError, match=r"dtype: found torch.int8"):
        load_heads(tmp_path, dtype=torch.int8)
