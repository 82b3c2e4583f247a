"""Head checkpoints of every published format, read strictly into HeadWeights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.checkpoint_error import CheckpointError
from vllm_medusa.checkpoint_extras import read_extras
from vllm_medusa.checkpoint_files import TensorSource, find_source
from vllm_medusa.checkpoint_formats import FORMATS, classify_keys
from vllm_medusa.checkpoint_save import convert_heads, save_heads
from vllm_medusa.checkpoint_tensors import PLAIN_DTYPES, HeadReader, stack
from vllm_medusa.checkpoint_vocabulary import check_token_map, mask_size, read_token_map
from vllm_medusa.head_weights import HeadSpec, HeadWeights

__all__ = [
    "FORMATS",
    "CheckpointError",
    "HeadSpec",
    "HeadWeights",
    "convert_heads",
    "load_heads",
    "save_heads",
]

logger = logging.getLogger(__name__)


def load_heads(
    path: str | Path,
    *,
    hidden_size: int | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> HeadWeights:
    """Read Medusa heads; the format is told from keys and shapes, never from config.json.

    Parameters
    ----------
    path
        Directory, .safetensors, .pt or index file, or a hub id ``owner/name[@revision]``.
    hidden_size, vocab_size
        Of the base model; a checkpoint that does not fit is refused.
    dtype
        Of the result; None keeps the file's (FP8 becomes bfloat16).
    base_model
        Name of the base model, for a warning when the heads name another one.

    Returns
    -------
    HeadWeights
        Stacked tensors on the CPU.

    Raises
    ------
    CheckpointError
        A ValueError that names file, key, found, expected and remedy.

    Examples
    --------
    ``load_heads("FasterDecoding/medusa-vicuna-7b-v1.3").spec`` has 5 heads of 1
    layer with hidden size 4096, although its config.json says 2 heads.
    """
    if dtype is not None and dtype not in PLAIN_DTYPES:
        raise ValueError(
            f"dtype: found {dtype}, expected one of {', '.join(map(str, PLAIN_DTYPES))}"
        )
    source = find_source(path)
    first_file = next(iter(source.key_files.values()), source.path)
    table = classify_keys(source.key_files, first_file, source.config)
    reader = HeadReader(source, table, dtype)
    weights = _assemble(reader, hidden_size, vocab_size, _base_note(source, base_model))
    _compare_config(weights)
    _compare_base(weights, base_model)
    return weights


def _assemble(
    reader: HeadReader, hidden_size: int | None, vocab_size: int | None, base_note: str
) -> HeadWeights:
    table, source = reader.table, reader.source
    num_heads, num_layers, tied = reader.count()
    lm_head_keys = _lm_head_keys(reader, num_heads)
    found_hidden = _hidden_size(reader, lm_head_keys, hidden_size, base_note)
    out_dtype = reader.resolve_dtype()
    token_map = read_token_map(reader)
    extras = read_extras(reader, num_heads, found_hidden, out_dtype)
    width = found_hidden if extras.rank is None else extras.rank
    lm_heads = _read_lm_heads(reader, lm_head_keys, width, out_dtype, token_map)
    vocab_size = _vocab_size(reader, lm_heads, token_map, vocab_size, base_note)
    if token_map is not None:
        check_token_map(reader, token_map, num_heads, vocab_size)

    spec = HeadSpec(
        num_heads=num_heads,
        num_layers=num_layers,
        hidden_size=found_hidden,
        vocab_size=vocab_size,
        bias=bool(table.biases),
        own_lm_head=lm_heads is not None,
        common_lm_head=lm_heads is not None and lm_heads.shape[0] < num_heads,
        vocab_subset_size=None if token_map is None else token_map.shape[1],
        vocab_subset_per_head=token_map is not None and token_map.shape[0] > 1,
        dtype=out_dtype,
        lm_head_rank=extras.rank,
        sequential=extras.path_weight is not None,
    )
    places = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    square = (found_hidden, found_hidden)

    def weight(layer: int, head: int) -> torch.Tensor:
        return reader.matrix(table.weights[head, 0 if tied else layer], square, out_dtype)

    def bias(layer: int, head: int) -> torch.Tensor:
        return reader.vector(table.biases[head, 0 if tied else layer], found_hidden, out_dtype)

    shape = (num_layers, num_heads, *square)
    return HeadWeights(
        spec,
        weight=stack(shape, out_dtype, places, weight),
        bias=stack(shape[:3], out_dtype, places, bias) if table.biases else None,
        lm_head=lm_heads,
        token_map=token_map,
        lm_head_down=extras.lm_head_down,
        path_weight=extras.path_weight,
        format=table.letter,
        source_files=_source_files(reader),
        tree_path=source.tree_path,
        metadata=_metadata(reader, tied),
    )


def _metadata(reader: HeadReader, tied: bool) -> dict[str, Any]:
    config = reader.source.config
    metadata = {
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "config": config,
    }
    if tied:
        metadata["tied_layers"] = True
    if reader.table.scales:
        metadata["dequantised"] = True
    return metadata


def _source_files(reader: HeadReader) -> tuple[Path, ...]:
    table = reader.table
    extras = (*table.lm_heads_down.values(), *table.path_weights.values())
    keys = [*table.weights.values(), *table.lm_heads.values(), *table.maps.values(), *extras]
    return tuple(sorted({reader.source.file_of(key) for key in keys}))


def _lm_head_keys(reader: HeadReader, num_heads: int) -> list[str]:
    table, config = reader.table, reader.source.config
    keys = [table.lm_heads[place] for place in sorted(table.lm_heads)]
    if table.common_lm_head:
        if keys:
            raise CheckpointError(
                reader.source.file_of(table.common_lm_head), table.common_lm_head,
                "a common lm_head beside lm_heads.*", "one or the other", "remove one of them",
            )
        return [table.common_lm_head]
    # vLLM's own default is one lm_head per head; a file without any is incomplete
    # unless the config says that the base's serves.
    says_own = config.get("model_type") == "medusa" and not config.get("original_lm_head")
    if table.letter == "D" and not keys and says_own:
        raise reader.missing(table.lm_head_key(0, 0), f"{num_heads} heads")
    return keys


def _hidden_size(
    reader: HeadReader, lm_head_keys: list[str], wanted: int | None, base_note: str
) -> int:
    table = reader.table
    # Without layers the first matrix tells, which of a low-rank lm_head is the one below.
    first = table.weights or table.lm_heads_down or dict(enumerate(lm_head_keys))
    key = first[min(first)]
    tensor = reader.source.read(key)
    found = tensor.shape[-1] if tensor.ndim and tensor.numel() else 0
    if found < 1 or (wanted is not None and found != wanted):
        raise CheckpointError(
            reader.source.file_of(key), key, f"hidden size {found} (shape {list(tensor.shape)})",
            f"hidden size {wanted or 'of a matrix'}",
            f"use heads trained for this base model{base_note}",
        )
    return found


def _read_lm_heads(
    reader: HeadReader,
    keys: list[str],
    width: int,
    dtype: torch.dtype,
    # [1 or num_heads, output_size]
    token_map: torch.Tensor | None,
) -> torch.Tensor | None:
    # -> [1 or num_heads, output_size, width]
    if not keys:
        return None
    first = reader.source.read(keys[0])
    rows = first.shape[0] if first.ndim else 0
    if rows < 1:
        raise CheckpointError(
            reader.source.file_of(keys[0]), keys[0], f"shape {list(first.shape)}",
            f"[rows, {width}]", "save the heads again",
        )
    subset = rows if token_map is None else token_map.shape[1]
    # vLLM keeps full lm_heads beside a token_map and cuts them when it loads.
    cut = reader.table.letter == "D" and rows > subset and token_map.shape[0] == 1
    if rows != subset and not cut:
        raise CheckpointError(
            reader.source.file_of(keys[0]), keys[0], f"{rows} rows", f"{subset}, the token map's",
            "cut the lm_heads and the map together",
        )
    if cut:
        check_token_map(reader, token_map, len(keys), rows)

    def read(head: int) -> torch.Tensor:
        matrix = reader.matrix(keys[head], (rows, width), dtype)
        return matrix[token_map[0]] if cut else matrix

    places = [(head,) for head in range(len(keys))]
    return stack((len(keys), subset, width), dtype, places, read)


def _vocab_size(
    reader: HeadReader,
    lm_heads: torch.Tensor | None,
    token_map: torch.Tensor | None,
    wanted: int | None,
    base_note: str,
) -> int | None:
    config = reader.source.config
    stated = config.get("vocab_size") or config.get("medusa_vocab_size")
    key = found = None
    if token_map is not None:
        found = mask_size(reader)
        key = reader.table.maps.get("t2d")
    elif lm_heads is not None:
        found = lm_heads.shape[1]
        key = next(iter(reader.table.lm_heads.values()), reader.table.common_lm_head)
    if found is not None and wanted is not None and found != wanted:
        raise CheckpointError(
            reader.source.file_of(key), key, f"a vocabulary of {found}", f"{wanted}",
            f"use heads trained for this base model{base_note}; heads for part of its vocabulary "
            "need a token_map in the file",
        )
    if found is None and wanted is None and isinstance(stated, int):
        return stated
    return found if wanted is None else wanted


def _base_note(source: TensorSource, base_model: str | None) -> str:
    recorded = source.config.get("base_model_name_or_path")
    if not _names_differ(recorded, base_model):
        return ""
    return f" {base_model!r}; config.json says these were trained for {recorded!r}"


def _names_differ(recorded: Any, base_model: str | None) -> bool:
    # Directories of one model differ from host to host: only the last part counts.
    if not isinstance(recorded, str) or recorded in ("", "N/A") or not base_model:
        return False
    return Path(recorded).name.lower() != Path(base_model).name.lower()


def _compare_base(weights: HeadWeights, base_model: str | None) -> None:
    recorded = weights.metadata["base_model_name_or_path"]
    if _names_differ(recorded, base_model):
        logger.warning(
            "%s: config.json says these heads were trained for %r, they are used with %r; "
            "acceptance will be low if the models differ",
            weights.source_files[0], recorded, base_model,
        )


def _compare_config(weights: HeadWeights) -> None:
    """Warn wherever config.json and the file disagree; the file is right."""
    config, spec = weights.metadata["config"], weights.spec
    modelopt = config.get("medusa")
    nested = modelopt if isinstance(modelopt, dict) else {}
    stated = {
        "medusa_num_heads": spec.num_heads,
        "num_medusa_heads": spec.num_heads,
        "num_heads": spec.num_heads,
        "medusa_num_layers": spec.num_layers,
        "num_medusa_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "medusa_hidden_size": spec.hidden_size,
        "medusa_fc_bias": spec.bias,
    }
    if weights.format in ("D", "G"):  # elsewhere this key counts the base's layers
        stated["num_hidden_layers"] = spec.num_layers
    if spec.vocab_size is not None:
        stated |= {"vocab_size": spec.vocab_size, "medusa_vocab_size": spec.vocab_size}
    if spec.output_size is not None:
        stated["truncated_vocab_size"] = spec.output_size
    for where, mapping in (("", config), ("medusa.", nested)):
        for key, value in stated.items():
            if key in mapping and mapping[key] != value:
                logger.warning(
                    "%s: config.json says %s%s = %r, the file holds %r; the file is used",
                    weights.source_files[0], where, key, mapping[key], value,
                )
