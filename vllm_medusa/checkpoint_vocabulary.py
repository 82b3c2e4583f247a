"""Token maps of a checkpoint: which base token each row of an lm_head stands for."""

from __future__ import annotations

import torch

from vllm_medusa.checkpoint_error import CheckpointError
from vllm_medusa.checkpoint_tensors import HeadReader

INTEGER_DTYPES = (torch.int16, torch.int32, torch.int64, torch.uint8)


def read_token_map(reader: HeadReader) -> torch.Tensor | None:
    """Return the checkpoint's map, [1 or num_heads, output_size] int64, or None.

    ``token_map`` (vLLM) and ``token_id_remap`` (FR-Spec) hold base ids. ``d2t``
    (speculators) holds offsets: row i stands for token i + d2t[i]. ``t2d`` is a
    mask over the base vocabulary with the same tokens set.
    """
    maps = reader.table.maps
    direct = [name for name in ("token_map", "token_id_remap") if name in maps]
    if len(direct) + ("d2t" in maps or "t2d" in maps) > 1:
        raise _refuse(
            reader, direct[0], f"several token maps ({', '.join(sorted(maps))})", "one of them",
            "remove the others",
        )
    if direct:
        ids = _read_integers(reader, direct[0])
    elif "d2t" in maps:
        offsets = _read_integers(reader, "d2t")
        ids = offsets + torch.arange(offsets.shape[-1])
        if "t2d" in maps:
            _compare_with_mask(reader, ids)
    elif "t2d" in maps:
        ids = _read_mask(reader).nonzero().flatten()
    else:
        return None
    return ids if ids.ndim == 2 else ids[None]


def mask_size(reader: HeadReader) -> int | None:
    """Return the base vocabulary that ``t2d`` states, None without one."""
    return _read_mask(reader).shape[0] if "t2d" in reader.table.maps else None


def check_token_map(
    reader: HeadReader, ids: torch.Tensor, num_heads: int, vocab_size: int | None
) -> None:
    """Refuse a map with the wrong number of rows, doubled or impossible ids."""
    name = next(iter(reader.table.maps))
    if ids.shape[0] not in (1, num_heads):
        raise _refuse(
            reader, name, f"{ids.shape[0]} rows", f"1 row or {num_heads}, one per head",
            "save one map for all heads or one for each",
        )
    upper = int(ids.max()) if ids.numel() else -1
    if ids.numel() == 0 or int(ids.min()) < 0 or (vocab_size is not None and upper >= vocab_size):
        span = f"ids {int(ids.min())}..{upper}" if ids.numel() else "no ids"
        raise _refuse(
            reader, name, span, f"ids 0..{vocab_size - 1}" if vocab_size else "ids >= 0",
            "use heads that were cut for this vocabulary",
        )
    for row in ids:
        if row.unique().numel() != row.numel():
            raise _refuse(
                reader, name, "a token id twice", "every token once", "rebuild the token map"
            )


def _read_integers(reader: HeadReader, name: str) -> torch.Tensor:
    tensor = reader.source.read(reader.table.maps[name])
    if tensor.dtype not in INTEGER_DTYPES or tensor.ndim not in (1, 2):
        raise _refuse(
            reader, name, f"shape {list(tensor.shape)} {tensor.dtype}",
            "int64 [subset] or [num_heads, subset]", "save the ids as integers",
        )
    return tensor.to(torch.int64)


def _read_mask(reader: HeadReader) -> torch.Tensor:
    tensor = reader.source.read(reader.table.maps["t2d"])
    if tensor.dtype != torch.bool or tensor.ndim != 1:
        raise _refuse(
            reader, "t2d", f"shape {list(tensor.shape)} {tensor.dtype}", "bool [vocab_size]",
            "save the mask of draft tokens as booleans",
        )
    return tensor


def _compare_with_mask(reader: HeadReader, ids: torch.Tensor) -> None:
    mask = _read_mask(reader)
    if ids.ndim != 1 or not torch.equal(ids.sort().values, mask.nonzero().flatten()):
        raise _refuse(
            reader, "d2t", "offsets that lead to other tokens than t2d marks",
            "i + d2t[i] to be the tokens of t2d", "rebuild both from one list of draft tokens",
        )


def _refuse(reader: HeadReader, name: str, found: str, expected: str, remedy: str):
    key = reader.table.maps[name]
    return CheckpointError(reader.source.file_of(key), key, found, expected, remedy)
