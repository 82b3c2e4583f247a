"""The tiny Llama with something added: an embedding table, quantised weights, adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


ADAPTED = ("q_proj", "v_proj", "down_proj")


def model_tensors(model: Path) -> dict[str, torch.Tensor]:
    """All weights of a model directory."""
    return load_file(model / "model.safetensors")


def linear_weights(model: Path) -> dict[str, torch.Tensor]:
    """Key without ``.weight`` -> [out, in] of every linear layer but the lm_head."""
    return {
        key.removesuffix(".weight"): weight
        for key, weight in model_tensors(model).items()
        if key.split(".")[-2] in LINEAR
    }


def write_embeddings(model: Path, path: Path) -> None:
    """The embedding table as a tensor file: prompts as embeddings are its rows."""
    torch.save(model_tensors(model)["model.embed_tokens.weight"], path)


def write_adapter(model: Path, directory: Path, seed: int, rank: int = 4) -> None:
    """A random LoRA adapter, of the lm_head too, strong enough to change the output."""
    generator = torch.Generator().manual_seed(seed)
    weights = linear_weights(model)
    weights = {key: weights[key] for key in weights if key.split(".")[-1] in ADAPTED}
    weights["lm_head"] = model_tensors(model)["lm_head.weight"]
    tensors = {}
    for key, weight in weights.items():
        down = torch.randn(rank, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], rank, generator=generator)
        scale = 0.3 * weight.norm() / (up @ down).norm()
        tensors[f"base_model.model.{key}.lora_A.weight"] = down
        tensors[f"base_model.model.{key}.lora_B.weight"] = up * scale
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*ADAPTED, "lm_head"],
        "bias": "none",
        "use_rslora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _write_quantised(model: Path, directory: Path, tensors: dict, config: dict) -> None:
    directory.mkdir()
    kept = {
        key: weight
        for key, weight in model_tensors(model).items()
        if key.split(".")[-2] not in LINEAR
    }
    save_file(kept | tensors, directory / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model / name, directory / name)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def write_int8(model: Path, directory: Path) -> None:
    """compressed-tensors W8A8: int8 weights per channel, int8 activations per token."""
    tensors = {}
    for key, weight in linear_weights(model).items():
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{key}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{key}.weight_scale"] = scale
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "channel", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    _write_quantised(model, directory, tensors, config)
