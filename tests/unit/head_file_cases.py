"""Damaged head checkpoints: one random source in, files of one case out.

The source is a ``random.Random``: hypothesis passes one that it can shrink, the long run
a plain one.  Every case starts as a checkpoint that loads and takes zero to three steps
away from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from head_pickle_cases import pickle_bytes
from safetensors.torch import save

SAFETENSORS, PICKLE = "medusa_lm_head.safetensors", "medusa_lm_head.pt"
INDEX = "model.safetensors.index.json"
# What the payload of a pickle bomb would create, were it executed.
TRACE = "executed"
HUGE = (2**31, 2**40, 2**63 - 1, 2**64 - 1, 10**12, -1)
DTYPES = (
    "BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64",
    "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "f32", "X",
)  # fmt: skip
TORCH_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.uint16, torch.uint32,
)  # fmt: skip
KEYS = (
    "", ".", "0", "0.0", "weight", "0.0.linear.weight", "0.7.linear.weight", "9.0.linear.weight",
    "0.9.weight", "0.1000000000.weight", "1000000000.0.linear.weight",
    "0.1000000000.linear.weight", "0.1000000000.linear.bias", "1000000000.1.weight",
    "9" * 5000 + ".0.linear.weight", "0.0.linear.weight_scale", "0.0.linear.input_scale",
    "0.0.linear.bias", "-1.0.linear.weight", "٣.0.linear.weight", "0.0.linear.weight\n",
    "0.1.bias", "blocks.0.layers.0.weight", "blocks.1000000000.layers.0.weight",
    "lm_heads.0.weight", "lm_heads.1000000000.weight", "lm_head.weight", "token_map",
    "token_id_remap", "d2t", "t2d", "medusa_heads.0.0.linear.weight", "medusa_heads.token_map",
    "medusa_head.0.0.linear.weight", "medusa_heads.blocks.0.layers.0.weight", "hydra", "\x00",
    "model.layers.0.mlp.up_proj.weight", "base_model.x", "__metadata__", "0.0.linear.weight ",
    "0.lm_head.weight", "1.lm_head.weight", "0.lm_head_down.weight", "9.lm_head_down.weight",
    "0.path.0.weight", "1.path.1.weight", "0.path.7.weight", "999.path.999.weight",
    "0.lm_head_down.weight_scale", "0.path.0.weight_scale", "lm_head.weight_scale",
)  # fmt: skip
PLACES = (
    "link", "loop", "dangling", "folder", "device", "suffix", "name", "file", "fifo", "sparse",
)  # fmt: skip
CONFIG_KEYS = (
    "model_type", "original_lm_head", "vocab_size", "medusa_vocab_size", "medusa_num_heads",
    "medusa_num_layers", "hidden_size", "medusa_hidden_size", "medusa", "num_hidden_layers",
    "base_model_name_or_path", "speculators_model_type", "truncated_vocab_size", "medusa_fc_bias",
)  # fmt: skip
JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 20, 2**63, 1e308, float("nan"), "", "medusa", "N/A", "x" * 300,
    [], [1], {}, {"medusa_num_heads": 7}, "a/b", "\ud800", "\x00", "../x",
)  # fmt: skip
TEXTS = (
    b"", b"{", b"[]", b"null", b"3", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000,
    b"\x00", b'{"a": 1, "a": 2}', b"1" * 5000, b"\xef\xbb\xbf{}",
)  # fmt: skip


@dataclasses.dataclass
class Case:
    """One checkpoint on disk.

    Attributes
    ----------
    directory
        Where all of it was written.
    path
        What a user would name.
    arguments
        Of ``load_heads``.
    tensors
        The tensors as written, None once bytes were changed behind them.
    steps
        What was done to it, for the report of a failure.
    """

    directory: Path
    path: Path
    arguments: dict[str, Any]
    tensors: dict[str, torch.Tensor] | None
    steps: list[str] = dataclasses.field(default_factory=list)


def base_tensors(rng: Random) -> dict[str, torch.Tensor]:
    """A small checkpoint of a random format that loads as it is."""
    heads, layers, size, rows = (rng.choice(n) for n in ((1, 2, 3), (0, 1, 1, 2), (1, 4), (5, 8)))
    prefix = rng.choice(("", "", "medusa_head.", "medusa_heads."))
    bias, own = rng.choice((True, False)), rng.choice((True, not layers))
    flat = rng.choice((False, False, True))
    if flat:
        prefix = ""
    dtype = rng.choice((torch.float32, torch.bfloat16))

    tensors = {}
    for head in range(heads):
        for layer in range(layers):
            stem = f"blocks.{head}.layers.{layer}" if flat else f"{prefix}{head}.{layer}.linear"
            tensors[f"{stem}.weight"] = _values(dtype, size, size) + head
            if bias:
                tensors[f"{stem}.bias"] = _values(dtype, size) + layer
    if not flat and not prefix and rng.choice((True, False)):
        kinds = ("common", "own", "low-rank", "none") if layers else ("own", "low-rank")
        tensors |= own_format_tensors(rng, rng.choice(kinds), dtype, heads, size, rows)
    elif own:
        for head in range(heads):
            key = f"lm_heads.{head}.weight" if flat else f"{prefix}{head}.{layers}.weight"
            tensors[key] = _values(dtype, rows, size)
        if rng.choice((True, False, False)) and (flat or not prefix):
            tensors["token_map" if flat else "token_id_remap"] = torch.arange(rows)
    return tensors


def own_format_tensors(
    rng: Random, kind: str, dtype: torch.dtype, heads: int, size: int, rows: int
) -> dict[str, torch.Tensor]:
    """What format M adds: common or low-rank lm_heads, path matrices."""
    tensors = {}
    rank = rng.choice((1, 2)) if kind == "low-rank" else size
    if kind == "common":
        tensors["lm_head.weight"] = _values(dtype, rows, size)
    elif kind != "none":
        for head in range(heads):
            tensors[f"{head}.lm_head.weight"] = _values(dtype, rows, rank)
            if kind == "low-rank":
                tensors[f"{head}.lm_head_down.weight"] = _values(dtype, rank, size)
    if rng.choice((True, False)):
        for head in range(heads):
            for place in range(head + 1):
                tensors[f"{head}.path.{place}.weight"] = _values(dtype, size, size)
    return tensors


def _values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.arange(math.prod(shape)) % 13 / 8 - 0.5).to(dtype).view(shape)


def change_tensor(rng: Random, tensors: dict[str, torch.Tensor]) -> str:
    """One step on keys, shapes, dtypes or values."""
    key = rng.choice(sorted(tensors)) if tensors else "x"
    tensor = tensors.get(key, torch.ones(2))
    kind = rng.choice(("drop", "rename", "add", "shape", "dtype", "value", "shift", "empty"))
    if kind == "drop":
        tensors.pop(key, None)
    elif kind == "rename":
        tensors[rng.choice(KEYS)] = tensors.pop(key, tensor)
    elif kind == "add":
        tensors[rng.choice(KEYS)] = tensor.clone()
    elif kind == "shape":
        shape = rng.choice(((), (1,), (0,), (0, 4), (4, 0), (2, 3), (1, 1, 1), (4, 4, 4), (3,)))
        tensors[key] = torch.ones(shape, dtype=tensor.dtype)
    elif kind == "dtype":
        tensors[key] = tensor.real.to(rng.choice(TORCH_DTYPES))
    elif kind == "value":
        extreme = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, -1, 7))
        tensors[key] = tensor.clone()
        if tensor.numel() and (tensor.is_floating_point() or abs(extreme) < 100):
            tensors[key].view(-1)[0] = extreme
    elif kind == "shift":
        old = f"{rng.choice((0, 1, 2))}."
        new = key.replace(old, f"{rng.choice((0, 1, 3, 64))}.", 1)
        tensors[new] = tensors.pop(key, tensor)
    else:
        tensors.clear()
    return f"{kind} {key[:40]}"


def change_header(rng: Random, content: bytes) -> bytes:
    """One step on the JSON header of safetensors, sizes kept true or not."""
    if len(content) < 8:
        return content
    (size,) = struct.unpack("<Q", content[:8])
    if not 2 <= size <= len(content) - 8:
        return content
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError):
        return content
    if not isinstance(header, dict) or not all(isinstance(e, dict) for e in header.values()):
        return content
    names = sorted(set(header) - {"__metadata__"})
    kind = rng.choice(("length", "dtype", "shape", "offsets", "field", "metadata", "text", "name"))
    if kind == "length":
        length = rng.choice((0, 1, size - 1, size + 1, *(n % 2**64 for n in HUGE)))
        return struct.pack("<Q", length) + content[8:]
    entry = header[rng.choice(names)] if names else {}
    if kind == "dtype":
        entry["dtype"] = rng.choice((*DTYPES, None, 3, []))
    elif kind == "shape":
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**32, 2**32], [2**63], [1.5], ["4", "4"], None, [4] * 70, [0, 2**62])
        )
    elif kind == "offsets":
        entry["data_offsets"] = [rng.choice((0, 1, 4, 64, *HUGE)) for _ in range(2)]
    elif kind == "field":
        entry[rng.choice(("dtype", "shape", "data_offsets", "x"))] = rng.choice(JSON_VALUES[:-6])
    elif kind == "metadata":
        header["__metadata__"] = rng.choice((None, [], {"a": 1}, {"format": "tf"}, {"a": "b"}, ""))
    elif kind == "name" and names:
        header[rng.choice(KEYS)] = header.pop(rng.choice(names))
    text = json.dumps(header).encode() if kind != "text" else rng.choice(TEXTS)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def change_bytes(rng: Random, content: bytes) -> bytes:
    """Truncate, flip, insert or append."""
    place = rng.randrange(len(content) + 1)
    kind = rng.choice(("cut", "flip", "insert", "append", "zeros", "head"))
    if kind == "cut":
        return content[:place]
    if kind == "head":
        return content[place:]
    noise = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8))))
    if kind == "flip":
        return content[:place] + noise + content[place + len(noise) :]
    if kind == "insert":
        return content[:place] + noise + content[place:]
    return content + (noise if kind == "append" else bytes(64))


def write_index(rng: Random, directory: Path, tensors: dict[str, torch.Tensor]) -> str:
    """A sharded checkpoint whose index may say anything."""
    (directory / "shard.safetensors").write_bytes(save(tensors))
    shards = (
        "gone.safetensors", "../x.safetensors", "/etc/passwd", ".", "", 3, None, ["a"], INDEX,
        "x" * 300 + ".safetensors", "\x00", "shard.safetensors/..", "/dev/zero", "\ud800",
    )  # fmt: skip
    weight_map: Any = dict.fromkeys(tensors, "shard.safetensors")
    kind = rng.choice(("true", "shard", "all", "map", "key"))
    if kind == "shard" and weight_map:
        weight_map[rng.choice(sorted(weight_map))] = rng.choice(shards)
    elif kind == "all":
        weight_map = dict.fromkeys(tensors, rng.choice(shards))
    elif kind == "map":
        weight_map = rng.choice(JSON_VALUES[:-3])
    elif kind == "key":
        weight_map[rng.choice(KEYS)] = "shard.safetensors"
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return kind


def write_surroundings(rng: Random, directory: Path) -> str:
    """config.json and tree.json: absent, odd, broken, links, folders."""
    name = rng.choice(("config.json", "config.json", "tree.json"))
    place = directory / name
    kind = rng.choice(("values", "text", "folder", "loop", "dangling", "fifo"))
    if kind == "values":
        keys = [rng.choice(CONFIG_KEYS) for _ in range(rng.choice((1, 2, 4)))]
        place.write_text(json.dumps({key: rng.choice(JSON_VALUES) for key in keys}))
    elif kind == "text":
        place.write_bytes(rng.choice(TEXTS))
    elif kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(name if kind == "loop" else "nowhere")
    return f"{name} {kind}"


def change_place(rng: Random, case: Case, file: Path) -> str:
    """Links, folders and names around the weights file."""
    kind = rng.choice(PLACES)
    if kind == "file":
        case.path = file
    elif kind == "name":
        odd = ("x" * 300, "a/b" * 2000, "\x00", "", "owner name", "~nobody", "x.pt", "\ud800")
        case.path = file.parent / rng.choice(odd)
    elif kind == "suffix":
        suffixes = (".pt", ".bin", ".safetensors", ".txt", "", ".PT", ".index.json")
        case.path = file.parent / f"other{rng.choice(suffixes)}"
        file.rename(case.path)
    elif kind == "link":
        file.rename(file.parent / "blob")
        file.symlink_to("blob")
    elif kind == "sparse":
        # Terabytes that take no room on the disk, with a header to match.
        size = rng.choice((1, 2**20))
        header = {"dtype": "F32", "shape": [size, size], "data_offsets": [0, 4 * size * size]}
        text = json.dumps({"0.0.linear.weight": header}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(file, 8 + len(text) + 4 * size * size)
        case.tensors = None
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "fifo":
            os.mkfifo(file)
            case.path = rng.choice((file, case.path))
        else:
            target = {"loop": file.name, "dangling": "nowhere", "device": "/dev/zero"}[kind]
            file.symlink_to(target)
    return kind


def write_case(rng: Random, directory: Path) -> Case:
    """Empty ``directory`` and write one case into it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = base_tensors(rng)
    case = Case(directory, directory, {}, tensors)
    for _ in range(rng.choice((0, 0, 1, 2))):
        case.steps.append(change_tensor(rng, tensors))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    container = rng.choice(("safetensors", "safetensors", "pickle", "index"))
    case.steps.append(container)
    file = directory / SAFETENSORS
    if container == "index":
        case.steps.append(write_index(rng, directory, tensors))
        file = directory / INDEX
    elif container == "pickle":
        file = directory / PICKLE
        content, kind = pickle_bytes(rng, tensors, directory / TRACE)
        case.steps.append(kind)
        case.tensors = tensors if kind == "plain" else None
        file.write_bytes(content)
    else:
        case.tensors = tensors
        file.write_bytes(save(tensors))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        change = rng.choice((change_bytes, change_header))
        file.write_bytes(change(rng, file.read_bytes()))
        case.steps.append(change.__name__)
        case.tensors = None
    if rng.choice((True, False, False)):
        case.steps.append(write_surroundings(rng, directory))
    if rng.choice((True, False, False, False)):
        case.steps.append(change_place(rng, case, file))
    if rng.choice((True, False, False)):
        case.arguments["hidden_size"] = rng.choice((1, 4, 5))
    if rng.choice((True, False, False)):
        case.arguments["vocab_size"] = rng.choice((5, 8, 20))
    if rng.choice((True, False)):
        case.arguments["dtype"] = rng.choice((torch.float32, torch.float16, torch.bfloat16))
    return case
