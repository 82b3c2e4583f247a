"""Tiny checkpoints of every published format, written as their makers write them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

K, D, V = 3, 8, 20
SUBSET = (0, 3, 4, 7, 19)


@dataclasses.dataclass
class Parts:
    """Random weights in the shapes of the facts: per head and layer, plain lists."""

    num_heads: int = K
    num_layers: int = 1
    hidden_size: int = D
    rows: int = V
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        d = self.hidden_size
        heads, layers = range(self.num_heads), range(self.num_layers)
        self.weights = [[rand(d, d) for _ in layers] for _ in heads]
        self.biases = [[rand(d) for _ in layers] for _ in heads]
        self.lm_heads = [rand(self.rows, d) for _ in heads]

    def nested(self, prefix: str = "", *, bias: bool = True, lm_heads: bool = True) -> dict:
        """``{h}.{l}.linear.*`` and ``{h}.{L}.weight`` (A, B, C, E2, F)."""
        tensors = {}
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                stem = f"{prefix}{head}.{layer}.linear"
                tensors[f"{stem}.weight"] = self.weights[head][layer]
                if bias:
                    tensors[f"{stem}.bias"] = self.biases[head][layer]
            if lm_heads:
                tensors[f"{prefix}{head}.{self.num_layers}.weight"] = self.lm_heads[head]
        return tensors

    def flat(self, prefix: str = "", *, bias: bool = False, lm_heads: bool = True) -> dict:
        """``blocks.{h}.layers.{l}.*`` and ``lm_heads.{h}.weight`` (D, G)."""
        tensors = {}
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                stem = f"{prefix}blocks.{head}.layers.{layer}"
                tensors[f"{stem}.weight"] = self.weights[head][layer]
                if bias:
                    tensors[f"{stem}.bias"] = self.biases[head][layer]
            if lm_heads:
                tensors[f"{prefix}lm_heads.{head}.weight"] = self.lm_heads[head]
        return tensors


def write(directory: Path, name: str, tensors: dict, config: dict | None = None) -> Path:
    """Write one weights file (suffix decides how) and config.json; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / name)
    else:
        torch.save(tensors, directory / name)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_sharded(directory: Path, shards: dict[str, dict], config: dict) -> Path:
    """Write a sharded safetensors model with its index; return the directory."""
    weight_map = {}
    for name, tensors in shards.items():
        write(directory, name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def medusa_config(num_heads: int = K, num_layers: int = 1, **extra) -> dict:
    """Return the config.json of A, C1 and, with ``version="2"``, C2."""
    return {
        "base_model_name_or_path": "maker/base-7b",
        "medusa_num_heads": num_heads,
        "medusa_num_layers": num_layers,
        **extra,
    }


def vllm_config(**extra) -> dict:
    """Return the config.json of D."""
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": D,
        "vocab_size": V,
        "num_heads": K,
        "num_hidden_layers": 1,
        "truncated_vocab_size": V,
        "medusa_fc_bias": False,
        "original_lm_head": False,
        **extra,
    }


def fp8_export(parts: Parts) -> tuple[dict, dict]:
    """Return (E2 tensors, float32 weights they stand for), per-tensor FP8 scales."""
    tensors, exact = {}, {}
    for key, value in parts.nested("medusa_heads.", bias=False).items():
        scale = value.float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
        quantised = (value.float() / scale).to(torch.float8_e4m3fn)
        tensors |= {key: quantised, f"{key}_scale": scale}
        tensors[key.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
        exact[key] = quantised.float() * scale
    return tensors, exact
