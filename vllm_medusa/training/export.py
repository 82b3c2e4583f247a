"""Writes trained heads and their tree as a checkpoint directory."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vllm_medusa.checkpoint_save import config_of, named_tensors, what_would_be_lost
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.training.calibrate import CalibratedTree, HeadRanks
from vllm_medusa.training.simulate import accepted_shares, simulate_budgets
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.tree import TokenTree

_STEM = "medusa_lm_head"
_INDEX = "model.safetensors.index.json"


def export_heads(
    heads: TrainableHeads,
    directory: str | Path,
    vocab_size: int,
    base_model: str | None = None,
    max_file_bytes: int = 4 * 2**20,
) -> list[Path]:
    """Write config.json and bf16 weights in format C2, or M for kinds that C2 cannot hold.

    Parameters
    ----------
    heads : TrainableHeads
    directory : path
        Made if absent; weights of an earlier export there are replaced.
    vocab_size : int
        Of the base model, whose lm_head the heads share.
    base_model : str, optional
        Name that the heads belong to, for the reader's check.
    max_file_bytes : int
        A larger checkpoint is cut between heads into several files with an index; a head by
        itself is never cut.

    Returns
    -------
    list[Path]
        The weight files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for old in [*directory.glob(f"{_STEM}*.safetensors"), directory / _INDEX]:
        old.unlink(missing_ok=True)
    weights = heads.to_weights(vocab_size)
    format = export_format(weights)
    shards = _shards(named_tensors(weights, format), max_file_bytes)
    names = [f"{_STEM}.safetensors"]
    if len(shards) > 1:
        total = len(shards)
        names = [f"{_STEM}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
        files = {key: name for name, part in zip(names, shards, strict=True) for key in part}
        size = sum(_num_bytes(part) for part in shards)
        _write_json(
            directory / _INDEX, {"metadata": {"total_size": size}, "weight_map": files}
        )  # fmt: skip
    for name, part in zip(names, shards, strict=True):
        save_file(part, directory / name, metadata={"format": "pt"})
    config: dict[str, Any] = {
        **config_of(weights, format), "version": "2", "torch_dtype": "bfloat16",
    }  # fmt: skip
    if base_model is not None:
        config = {"base_model_name_or_path": base_model, **config}
    _write_json(directory / "config.json", config)
    return [directory / name for name in names]


def export_format(weights: HeadWeights) -> str:
    """Format that holds the heads: the widest spread one, C2, where it can."""
    return "M" if what_would_be_lost(weights, "C2") else "C2"


def _shards(tensors: dict[str, Tensor], max_file_bytes: int) -> list[dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        head = key.partition(".")[0]
        parts.setdefault(head if head.isdigit() else key, {})[key] = tensor
    shards: list[dict[str, Tensor]] = [{}]
    for part in parts.values():
        if shards[-1] and _num_bytes(shards[-1]) + _num_bytes(part) > max_file_bytes:
            shards.append({})
        shards[-1].update(part)
    return shards


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_tree(
    tree: CalibratedTree, ranks: HeadRanks, directory: str | Path, source: str
) -> TokenTree:
    """Write tree.json: paths best first, how often each is right, and the heads' accuracies."""
    metadata = {
        "source": source,
        "expected_tokens_per_step": round(tree.count.tokens_per_step, 4),
        "calibration_steps": tree.count.steps,
        "frequencies": [round(value, 6) for value in tree.frequencies],
        # share of the whole tree's steps that accept each node; unlike the frequencies, which
        # the search ranks by, measured where these steps start
        "accepted_shares": [
            round(share, 6) for share in accepted_shares(ranks.ranks, ranks.offsets, tree.paths)
        ],
        # index n - 1: the first n nodes, exact on the calibration answers
        "tokens_per_step_by_nodes": [
            round(count.tokens_per_step, 4)
            for count in simulate_budgets(
                ranks.ranks, ranks.offsets, tree.paths, range(1, len(tree.paths) + 1)
            ).values()
        ],
        "accuracies": ranks.accuracies().round(6).tolist(),
    }
    found = TokenTree(tree.paths, metadata)
    found.validate(ranks.ranks.shape[1])
    found.save(Path(directory) / "tree.json")
    return found
