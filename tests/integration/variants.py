"""The tiny Llama with something added: an adapter, an embedding table, quantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4
# Input channels that share a scale in 4-bit weights.
GROUP = 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def write_adapter(model: Path, directory: Path) -> None:
    """A LoRA adapter on all linear layers, strong enough to change the output."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for key, weight in linear_weights(model).items():
        down = torch.randn(RANK, weight.shape[1], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], RANK, generator=generator) * 0.2
        tensors[f"base_model.model.{key}.lora_A.weight"] = down
        tensors[f"base_model.model.{key}.lora_B.weight"] = up
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "model",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(LINEAR),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def write_embeddings(model: Path, path: Path) -> None:
    """The embedding table as a tensor file: prompts as embeddings are its rows."""
    torch.save(model_tensors(model)["model.embed_tokens.weight"], path)


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


def _pack(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight 4-bit values along ``dim`` in one int32, lowest first."""
    groups = values.to(torch.int64).unflatten(dim, (-1, 8))
    shape = [1] * groups.ndim
    shape[dim + 1] = 8
    packed = (groups << (4 * torch.arange(8)).view(shape)).sum(dim + 1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def write_gptq(model: Path, directory: Path) -> None:
    """GPTQ: symmetric 4-bit weights in groups of input channels."""
    tensors = {}
    for key, weight in linear_weights(model).items():
        by_input = weight.T.contiguous()
        groups = by_input.unflatten(0, (-1, GROUP))
        scales = groups.abs().amax(1) / 7
        quantised = (groups / scales[:, None]).round().clamp(-8, 7) + 8
        tensors[f"{key}.qweight"] = _pack(quantised.flatten(0, 1), 0)
        # GPTQ stores zero points less one: 8 - 1 in every place.
        tensors[f"{key}.qzeros"] = _pack(torch.full(scales.shape, 7), 1)
        tensors[f"{key}.scales"] = scales
        tensors[f"{key}.g_idx"] = (torch.arange(by_input.shape[0]) // GROUP).to(torch.int32)
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    _write_quantised(model, directory, tensors, config)
