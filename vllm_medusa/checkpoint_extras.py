"""What only format M stores: low-rank lm_heads and the path matrices of sequential heads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_medusa.checkpoint_error import CheckpointError
from vllm_medusa.checkpoint_tensors import HeadReader, stack


class Extras(NamedTuple):
    """Stacked tensors of format M, None where the checkpoint has none."""

    # [num_heads, rank, hidden_size]
    lm_head_down: torch.Tensor | None
    # [num_heads * (num_heads + 1) / 2, hidden_size, hidden_size]
    path_weight: torch.Tensor | None

    @property
    def rank(self) -> int | None:
        """Inner size of the low-rank lm_heads."""
        return None if self.lm_head_down is None else self.lm_head_down.shape[1]


def read_extras(reader: HeadReader, num_heads: int, hidden_size: int, dtype: torch.dtype) -> Extras:
    """Read both kinds, complete or not at all."""
    table = reader.table
    down = None
    if keys := table.lm_heads_down:
        _check_complete(reader, keys, range(num_heads), "{}.lm_head_down.weight")
        if not (table.lm_heads or table.common_lm_head):
            raise reader.missing("0.lm_head.weight", "lm_head_down without an lm_head")
        first = reader.source.read(keys[0])
        rank = first.shape[0] if first.ndim else 0
        if not 1 <= rank <= hidden_size:
            raise CheckpointError(
                reader.source.file_of(keys[0]),
                keys[0],
                f"shape {list(first.shape)}",
                f"[rank, {hidden_size}] with a rank from 1 to {hidden_size}",
                "save the heads again",
            )
        down = _stack(reader, [keys[head] for head in range(num_heads)], (rank, hidden_size), dtype)
    paths = None
    if keys := table.path_weights:
        pairs = [(head, place) for head in range(num_heads) for place in range(head + 1)]
        _check_complete(reader, keys, pairs, "{0[0]}.path.{0[1]}.weight")
        if not table.weights:
            raise reader.missing(table.weight_key(0, 0), "path matrices without a layer")
        paths = _stack(reader, [keys[pair] for pair in pairs], (hidden_size, hidden_size), dtype)
    return Extras(down, paths)


def _stack(
    reader: HeadReader, keys: list[str], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """[len(keys), *shape], one matrix a key."""
    places = [(index,) for index in range(len(keys))]
    return stack(
        (len(keys), *shape), dtype, places, lambda index: reader.matrix(keys[index], shape, dtype)
    )


def _check_complete(reader: HeadReader, keys: dict, wanted, name: str) -> None:
    wanted = list(wanted)
    for place in wanted:
        if place not in keys:
            raise reader.missing(name.format(place), f"{len(keys)} of {len(wanted)} such matrices")
    extra = next((place for place in keys if place not in wanted), None)
    if extra is not None:
        raise CheckpointError(
            reader.source.file_of(keys[extra]),
            keys[extra],
            "a matrix without its head",
            f"{len(wanted)} such matrices for the heads in the file",
            "remove it",
        )
