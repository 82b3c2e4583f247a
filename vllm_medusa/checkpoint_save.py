"""Writes HeadWeights in the formats that other programs read, or says why it cannot."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_medusa.checkpoint_error import CheckpointError
from vllm_medusa.checkpoint_files import HEADS_FILE, KNOWN_FILES
from vllm_medusa.head_weights import HeadSpec, HeadWeights

logger = logging.getLogger(__name__)

# Format that can be written -> file name. "A-safetensors" is C1 by another name.
SAVE_FORMATS = {
    "A-safetensors": HEADS_FILE,
    "C1": HEADS_FILE,
    "C2": HEADS_FILE,
    "D": "model.safetensors",
    "F": HEADS_FILE,
    "G": "model.safetensors",
    "M": HEADS_FILE,
}


def save_heads(
    weights: HeadWeights,
    directory: str | Path,
    format: str = "C2",
    extra_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json and one safetensors file, bit-exact.

    Parameters
    ----------
    weights
        Heads; ``metadata["base_model_name_or_path"]`` goes into config.json.
    directory
        Made if absent. A file of the same format is replaced at once or not at
        all; weights of another format there are an error, as a reader could
        pick either.
    format
        One of ``SAVE_FORMATS``.
    extra_config
        Further entries for config.json.

    Returns
    -------
    Path
        The weights file.

    Raises
    ------
    CheckpointError
        When the format cannot hold these heads; the message says what would be lost.
    """
    directory = Path(directory)
    if format not in SAVE_FORMATS:
        raise ValueError(f"format: found {format!r}, expected one of {', '.join(SAVE_FORMATS)}")
    _refuse_losses(weights, format, directory)
    _warn_of_readers(weights.spec, format)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / SAVE_FORMATS[format]
    others = [name for name in KNOWN_FILES if name != target.name and (directory / name).exists()]
    if others:
        raise CheckpointError(
            directory, None, f"other weights ({', '.join(others)})",
            f"an empty directory or one with {target.name}", "choose another directory",
        )
    config = config_of(weights, format) | dict(extra_config or {})
    # Renaming is atomic: a reader never sees half a file.
    partial = target.with_suffix(".partial")
    save_file(named_tensors(weights, format), partial, metadata={"format": "pt"})
    partial.replace(target)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def convert_heads(weights: HeadWeights, directory: str | Path, format: str) -> Path:
    """Write loaded heads in another format, with the tree.json that lay beside them."""
    directory = Path(directory)
    if any(directory.resolve() == file.parent.resolve() for file in weights.source_files):
        raise CheckpointError(
            directory, None, "the source's own directory", "another directory",
            "choose a new directory, so that the original stays readable",
        )
    target = save_heads(weights, directory, format)
    if weights.tree_path is not None:
        shutil.copyfile(weights.tree_path, directory / "tree.json")
    return target


def what_would_be_lost(weights: HeadWeights, format: str) -> list[str]:
    """Name every part of the heads that ``format`` has no place for."""
    spec = weights.spec
    losses = []
    if format != "M" and spec.lm_head_rank is not None:
        losses.append("low-rank lm_heads (the format holds whole ones)")
    if format != "M" and spec.sequential:
        losses.append("sequential heads (the format has no path matrices)")
    if format == "M":
        if spec.num_layers == 0:
            losses.append("no layers (the file would not tell the number of heads)")
        if not (spec.own_lm_head or spec.sequential or spec.num_token_maps):
            losses.append("nothing but layers (the file would be C2)")
        return losses
    if spec.vocab_subset_per_head:
        losses.append("a token map per head (the format holds one for all heads)")
    if format in ("C2", "A-safetensors", "C1", "F"):
        if spec.common_lm_head:
            losses.append("one own lm_head for all heads (the format holds one per head or none)")
        if format == "C2" and spec.own_lm_head and not spec.common_lm_head:
            losses.append("own lm_heads (the format shares the base model's)")
        if format != "C2" and not spec.own_lm_head:
            losses.append("no own lm_heads (the format stores one per head)")
        if format == "F" and spec.vocab_subset_size is None:
            losses.append("no token map (the format needs one)")
        if format != "F" and spec.vocab_subset_size is not None:
            losses.append("a token map (the format scores the whole vocabulary)")
        if format == "C2" and spec.num_layers == 0:
            losses.append("no layers (the file would hold no tensor)")
        return losses
    if spec.vocab_size is None:
        losses.append("an unknown vocabulary size (give vocab_size when loading)")
    if format == "D" and not spec.own_lm_head:
        losses.append("no own lm_heads (vLLM's loader needs them in the file)")
    if spec.num_layers == 0 and spec.num_lm_heads != spec.num_heads:
        losses.append("no layers (the file would not tell the number of heads)")
    return losses


def _refuse_losses(weights: HeadWeights, format: str, directory: Path) -> None:
    losses = what_would_be_lost(weights, format)
    if losses:
        holding = [name for name in SAVE_FORMATS if not what_would_be_lost(weights, name)]
        raise CheckpointError(
            directory, None, f"heads with {' and '.join(losses)}",
            f"heads that format {format} can hold",
            f"{', '.join(holding)} would hold them" if holding else "no format written here does",
        )


def _warn_of_readers(spec: HeadSpec, format: str) -> None:
    # Heads that the format holds, and we read back, but its own program does not.
    if format == "C2" and spec.num_layers != 1:
        logger.warning("format C2 with %d layers: TGI reads one layer only", spec.num_layers)
    if format == "D" and spec.num_token_maps and spec.num_lm_heads == spec.num_heads:
        logger.warning(
            "format D with a token map and an lm_head per head: vLLM 0.32's own loader takes a "
            "token map only with one lm_head for all heads"
        )


def named_tensors(weights: HeadWeights, format: str) -> dict[str, torch.Tensor]:
    """Tensors on the CPU under the names that ``format`` gives them."""
    spec = weights.spec
    flat = format in ("D", "G")
    tensors: dict[str, torch.Tensor] = {}
    for head in range(spec.num_heads):
        for layer in range(spec.num_layers):
            stem = f"blocks.{head}.layers.{layer}" if flat else f"{head}.{layer}.linear"
            tensors[f"{stem}.weight"] = weights.weight[layer, head]
            if weights.bias is not None:
                tensors[f"{stem}.bias"] = weights.bias[layer, head]
    if format == "M":
        tensors |= _own_tensors(weights)
        return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    for head in range(spec.num_lm_heads):
        key = f"lm_heads.{head}.weight" if flat else f"{head}.{spec.num_layers}.weight"
        tensors[key] = weights.lm_head[head]
    if weights.token_map is not None:
        ids = weights.token_map[0]
        if format == "G":
            mask = torch.zeros(spec.vocab_size, dtype=torch.bool)
            mask[ids] = True
            tensors |= {"t2d": mask, "d2t": ids - torch.arange(ids.numel())}
        else:
            tensors["token_id_remap" if format == "F" else "token_map"] = ids
    # Slices of one stack share memory, which safetensors refuses.
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


def _own_tensors(weights: HeadWeights) -> dict[str, torch.Tensor]:
    spec = weights.spec
    tensors: dict[str, torch.Tensor] = {}
    for head in range(spec.num_lm_heads):
        key = "lm_head.weight" if spec.common_lm_head else f"{head}.lm_head.weight"
        tensors[key] = weights.lm_head[head]
    for head in range(spec.num_heads if spec.lm_head_rank is not None else 0):
        tensors[f"{head}.lm_head_down.weight"] = weights.lm_head_down[head]
    if weights.path_weight is not None:
        pairs = [(head, place) for head in range(spec.num_heads) for place in range(head + 1)]
        for matrix, (head, place) in zip(weights.path_weight, pairs, strict=True):
            tensors[f"{head}.path.{place}.weight"] = matrix
    if weights.token_map is not None:
        ids = weights.token_map
        tensors["token_map"] = ids if spec.vocab_subset_per_head else ids[0]
    return tensors


def config_of(weights: HeadWeights, format: str) -> dict[str, Any]:
    """What config.json says of the heads."""
    spec = weights.spec
    base = weights.metadata.get("base_model_name_or_path")
    config: dict[str, Any] = {} if base is None else {"base_model_name_or_path": base}
    if format in ("D", "G"):
        return config | _flat_config(spec, format)
    config |= {"medusa_num_heads": spec.num_heads, "medusa_num_layers": spec.num_layers}
    # TGI and FasterDecoding ignore the sizes; vLLM otherwise assumes 4096 and 32001.
    config["hidden_size"] = spec.hidden_size
    if spec.vocab_size is not None:
        config["vocab_size"] = spec.vocab_size
    if format == "C2":
        config["version"] = "2"
    if format == "M":
        config |= {"lm_head_rank": spec.lm_head_rank, "sequential": spec.sequential}
    return config


def _flat_config(spec: HeadSpec, format: str) -> dict[str, Any]:
    config = {
        "num_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "truncated_vocab_size": spec.output_size,
        "medusa_fc_bias": spec.bias,
        "original_lm_head": spec.num_lm_heads < spec.num_heads,
        "torch_dtype": str(spec.dtype).removeprefix("torch."),
    }
    if format == "D":
        return config | {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
        }
    return config | {
        "speculators_model_type": "medusa",
        "medusa_hidden_size": spec.hidden_size,
        "medusa_vocab_size": spec.vocab_size,
    }
