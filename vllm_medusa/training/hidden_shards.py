"""Hidden states in files: extracted shard by shard, resumed, and read through the page cache."""

import hashlib
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import (
    HiddenStateSet,
    extract_hidden_states,
    join_labels,
    label_tables,
    row_offsets,
)
from vllm_medusa.training.sharded_rows import ShardedRows

MANIFEST_FILE = "manifest.json"
# 2**18 rows of 4096 bf16 values are 2 GB.
SHARD_ROWS = 2**18


def store_hidden_states(
    model: Any,
    conversations: ConversationSet,
    num_heads: int,
    directory: str | Path,
    model_name: str,
    shard_rows: int = SHARD_ROWS,
    device: torch.device | str | None = None,
) -> HiddenStateSet:
    """The same rows as ``extract_hidden_states``, kept in ``directory``.

    Shards that a stopped run finished are used again. A folder that was made from another
    model, dtype or other conversations is refused.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tables = label_tables(conversations, num_heads)
    offsets = row_offsets(tables)
    size = model.config.hidden_size
    manifest = {
        "model": model_name, "dtype": str(model.dtype), "hidden_size": size,
        "num_heads": num_heads, "rows": int(offsets[-1]), "shard_rows": shard_rows,
        "conversations": _digest(conversations),
    }  # fmt: skip
    _check_manifest(directory / MANIFEST_FILE, manifest)
    shards = []
    for number, (first, last) in enumerate(_ranges(offsets, shard_rows)):
        path = directory / f"hidden-{number:05}.bin"
        if not path.exists():
            part = conversations.select(np.arange(first, last))
            _write(path, extract_hidden_states(model, part, num_heads, store_device="cpu").hidden)
        rows = int(offsets[last] - offsets[first])
        flat = torch.from_file(str(path), shared=False, size=rows * size, dtype=model.dtype)
        shards.append(flat.view(rows, size))
    target = torch.device(device) if device is not None else next(model.parameters()).device
    labels = join_labels(tables, num_heads).to(target)
    return HiddenStateSet(ShardedRows(shards, target), labels, offsets)


def hidden_states_of(
    model: Any, answers: ConversationSet, config: TrainConfig, output: Path, model_name: str
) -> HiddenStateSet:
    """Hidden states where ``config.hidden_states`` wants them; files go below ``output``."""
    if config.hidden_states == "memory":
        return extract_hidden_states(model, answers, config.num_heads)
    name = f"{model_name} {config.quantise}"
    return store_hidden_states(model, answers, config.num_heads, output / "hidden_states", name)


def _ranges(offsets: np.ndarray, shard_rows: int) -> list[tuple[int, int]]:
    """Ranges of whole conversations with about ``shard_rows`` rows each, none without rows.

    >>> _ranges(np.array([0, 3, 6, 6, 7]), 4)
    [(0, 2), (2, 4)]
    """
    ranges, first = [], 0
    while first < len(offsets) - 1:
        last = max(first + 1, bisect_right(offsets.tolist(), int(offsets[first]) + shard_rows - 1))
        last = min(last, len(offsets) - 1)
        if offsets[-1] == offsets[last]:
            last = len(offsets) - 1
        ranges.append((first, last))
        first = last
    return ranges


def _digest(conversations: ConversationSet) -> str:
    digest = hashlib.sha256()
    for part in (conversations.token_ids, conversations.answer_mask, conversations.offsets):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _check_manifest(path: Path, wanted: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(path.read_text())
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path.parent} holds hidden states with {key} {found.get(key)!r}; expected "
                f"{value!r}. Remove the folder, or train with the settings it was made with"
            )


def _write(path: Path, hidden: Tensor) -> None:
    part = path.with_suffix(".part")
    hidden.contiguous().view(torch.uint8).numpy().tofile(part)
    part.replace(path)
