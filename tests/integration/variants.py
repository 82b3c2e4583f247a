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


def _write_quantised(
    model: Path, directory: Path, tensors: dict, config: dict, dtype: torch.dtype = torch.float32
) -> None:
    """The model with ``tensors`` in place of the weights of the same layers."""
    directory.mkdir()
    replaced = {key.rpartition(".")[0] for key in tensors}
    kept = {
        key: weight.to(dtype)
        for key, weight in model_tensors(model).items()
        if key.removesuffix(".weight") not in replaced
    }
    save_file(kept | tensors, directory / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model / name, directory / name)
    path = directory / "config.json"
    changes = {"quantization_config": config, "dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


# Input features that share a scale.
GROUP_SIZE = 32
# Where AutoAWQ puts eight neighbouring outputs in a word, lowest bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed_words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[..., n] integers of four bits -> [..., n / 8] int32."""
    eight = values.unflatten(-1, (-1, 8))[..., list(order)].long()
    words = (eight << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric: [out, in] integers around 8, and scales [out, in / GROUP_SIZE]."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    scales = groups.abs().amax(-1) / 7
    integers = (groups / scales[..., None]).round().clamp(-8, 7) + 8
    return integers.flatten(1).long(), scales


def write_gptq(model: Path, directory: Path, lm_head: bool = False) -> None:
    """GPTQ with 4 bits: words of eight inputs; the zero point, 8, is stored as 7."""
    weights, tensors = linear_weights(model), {}
    if lm_head:
        weights["lm_head"] = model_tensors(model)["lm_head.weight"]
    for key, weight in weights.items():
        integers, scales = four_bits(weight)
        tensors[f"{key}.qweight"] = packed_words(integers).T.contiguous()
        tensors[f"{key}.scales"] = scales.T.contiguous().half()
        tensors[f"{key}.qzeros"] = packed_words(torch.full_like(scales.T, 7))
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "desc_act": False,
        "sym": True,
        "lm_head": lm_head,
    }
    _write_quantised(model, directory, tensors, config, torch.float16)


def write_awq(model: Path, directory: Path) -> None:
    """AWQ with 4 bits and a zero point: words of eight outputs."""
    tensors = {}
    for key, weight in linear_weights(model).items():
        groups = weight.unflatten(1, (-1, GROUP_SIZE))
        low, high = groups.amin(-1), groups.amax(-1)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        integers = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        tensors[f"{key}.qweight"] = packed_words(integers.flatten(1).T, AWQ_ORDER)
        tensors[f"{key}.qzeros"] = packed_words(zeros.T, AWQ_ORDER)
        tensors[f"{key}.scales"] = scales.T.contiguous().half()
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True}
    _write_quantised(model, directory, tensors, config | {"version": "gemm"}, torch.float16)


def write_int4(model: Path, directory: Path) -> None:
    """compressed-tensors W4A16: words of eight inputs, scales per group."""
    tensors = {}
    for key, weight in linear_weights(model).items():
        integers, scales = four_bits(weight)
        tensors[f"{key}.weight_packed"] = packed_words(integers)
        tensors[f"{key}.weight_scale"] = scales.contiguous()
        tensors[f"{key}.weight_shape"] = torch.tensor(weight.shape)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights | {"group_size": GROUP_SIZE}}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    _write_quantised(model, directory, tensors, config)


def write_fp8(model: Path, directory: Path) -> None:
    """compressed-tensors W8A8 with floats of eight bits: scales per tensor and per token."""
    tensors = {}
    for key, weight in linear_weights(model).items():
        scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
        tensors[f"{key}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{key}.weight_scale"] = scale[None]
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": "tensor", "dynamic": False},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    _write_quantised(model, directory, tensors, config)
