"""KeyTable: which tensor of a checkpoint is which, told from the keys alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_medusa.checkpoint_error import CheckpointError

# Letter -> what wrote it.
FORMATS = {
    "A": "FasterDecoding v0.1 or TensorRT-LLM input (pickle, own lm_heads)",
    "B": "Medusa-2 whole model (medusa_head.*)",
    "C1": "TGI v1 (safetensors, own lm_heads)",
    "C2": "TGI v2 (shared lm_head)",
    "D": "vLLM (blocks.*)",
    "E2": "NVIDIA ModelOpt whole model (medusa_heads.*)",
    "F": "FR-Spec (token_id_remap)",
    "G": "speculators (t2d / d2t)",
    "M": "vllm-medusa (low-rank or common lm_head, sequential heads)",
}

MAP_KEYS = ("token_map", "token_id_remap", "d2t", "t2d")

# Config keys that only the speculators format writes; its keys are D's otherwise.
SPECULATORS_CONFIG = ("speculators_model_type", "medusa_hidden_size", "medusa_vocab_size")

# Of heads and layers; a longer one is damage and would only make sizes explode.
_NUMBER = "[0-9]{1,3}"
# `{head}.{layer}.linear.weight`, `{head}.{layer}.weight` (lm_head) and FP8 scales.
_NESTED = re.compile(
    rf"(?P<head>{_NUMBER})\.(?P<layer>{_NUMBER})\.(?P<linear>linear\.)?"
    r"(?P<part>weight|bias|weight_scale|input_scale)"
)
_BLOCK = re.compile(
    rf"blocks\.(?P<head>{_NUMBER})\.layers\.(?P<layer>{_NUMBER})\.(?P<part>weight|bias)"
)
# What only format M has: `{head}.lm_head.weight` (or a common one), `{head}.lm_head_down.weight`,
# `{head}.path.{place}.weight`.
_OWN = re.compile(
    rf"(?:(?P<head>{_NUMBER})\.)?"
    rf"(?P<part>lm_head|lm_head_down|path\.(?P<place>{_NUMBER}))\.weight"
)
_LM_HEAD = re.compile(rf"lm_heads\.(?P<head>{_NUMBER})\.weight")

# (pattern searched in the keys, what it is, what to do)
_FOREIGN = (
    (
        re.compile(r"hydra|res_connection"),
        "a Hydra checkpoint",
        "Hydra heads see the drafted tokens and are another architecture; train Medusa heads",
    ),
    (
        re.compile(r"^(midlayer|layers\.\d+\.self_attn|fc\.weight)"),
        "an EAGLE checkpoint",
        'use it with vLLM\'s own "eagle" or "eagle3" method, or train Medusa heads',
    ),
    (
        re.compile(r"^base_model\.|modules_to_save|lora_[AB]"),
        "a PEFT adapter",
        "merge it into the base model first (merge_and_unload) and save the whole model",
    ),
)

Place = tuple[int, int]


@dataclasses.dataclass
class KeyTable:
    """Keys by their meaning.

    Parameters
    ----------
    file
        Checkpoint, for messages.
    prefix
        What precedes the head number in ``{prefix}{h}.{l}.linear.weight``.
    flat
        Whether keys follow ``blocks.{h}.layers.{l}`` (D, G).
    """

    file: Path
    letter: str
    prefix: str = ""
    flat: bool = False
    # (head, layer) -> key
    weights: dict[Place, str] = dataclasses.field(default_factory=dict)
    biases: dict[Place, str] = dataclasses.field(default_factory=dict)
    # (head, position in its block) -> key; position 0 in flat formats
    lm_heads: dict[Place, str] = dataclasses.field(default_factory=dict)
    # name without prefix -> key
    maps: dict[str, str] = dataclasses.field(default_factory=dict)
    # key of a weight -> key of its scale
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    # one matrix for all heads: `lm_head.weight`
    common_lm_head: str | None = None
    # whether lm_heads are named (M) and not at a position behind the layers
    named_lm_heads: bool = False
    # head -> key, [rank, hidden_size] (M)
    lm_heads_down: dict[int, str] = dataclasses.field(default_factory=dict)
    # (head, place on its path) -> key (M)
    path_weights: dict[Place, str] = dataclasses.field(default_factory=dict)

    def weight_key(self, head: int, layer: int, part: str = "weight") -> str:
        """Return the key that head and layer have in this format."""
        if self.flat:
            return f"{self.prefix}blocks.{head}.layers.{layer}.{part}"
        return f"{self.prefix}{head}.{layer}.linear.{part}"

    def lm_head_key(self, head: int, position: int) -> str:
        """Return the key of a head's own lm_head in this format."""
        if self.flat:
            return f"{self.prefix}lm_heads.{head}.weight"
        if self.letter == "M":
            return f"{head}.lm_head.weight"
        return f"{self.prefix}{head}.{position}.weight"


def classify_keys(keys: Iterable[str], file: Path, config: Mapping[str, Any]) -> KeyTable:
    """Sort the keys of a checkpoint, or refuse it.

    Parameters
    ----------
    keys
        All tensor names.
    file
        For messages; a pickle of digit keys is format A, safetensors C1.
    config
        Only tells D from G, whose keys may be the same.
    """
    keys = sorted(keys)
    _refuse_foreign(keys, file)
    if any(key.removeprefix("medusa_heads.").startswith(("blocks.", "lm_heads.")) for key in keys):
        return _classify_flat(keys, file, config)
    for prefix, letter in (("medusa_heads.", "E2"), ("medusa_head.", "B"), ("", "A")):
        if any(re.match(re.escape(prefix) + r"\d+\.", key) for key in keys):
            return _classify_nested(keys, file, prefix, letter)
    raise CheckpointError(
        file, None, f"{len(keys)} tensors without a Medusa head (first: {keys[:3]})",
        "keys such as 0.0.linear.weight, medusa_head.0.0.linear.weight or blocks.0.layers.0.weight",
        "give the checkpoint of the heads, not that of the base model",
    )


def _refuse_foreign(keys: list[str], file: Path) -> None:
    if not keys:
        raise CheckpointError(
            file, None, "no tensors", "Medusa heads", "download or save the checkpoint again"
        )
    medusa = re.compile(r"^(medusa_heads?\.|blocks\.|\d+\.\d+\.)")
    for pattern, name, remedy in _FOREIGN:
        culprit = next((key for key in keys if pattern.search(key)), None)
        # A whole Medusa-2 model holds `model.layers..`, never bare EAGLE keys, but
        # a stray adapter key beside heads is reported as an extra key instead.
        if culprit and ("hydra" in name.lower() or not any(map(medusa.match, keys))):
            raise CheckpointError(file, culprit, name, "Medusa heads", remedy)


def _classify_nested(keys: list[str], file: Path, prefix: str, letter: str) -> KeyTable:
    table = KeyTable(file, letter, prefix)
    for key in keys:
        if not key.startswith(prefix):
            continue  # B, E2: the base model's own tensors
        name = key.removeprefix(prefix)
        if not prefix and _take_own(table, name, key):
            continue
        match = _NESTED.fullmatch(name)
        if match is None or (match["part"] == "bias" and not match["linear"]):
            raise _extra_key(file, key)
        place = (int(match["head"]), int(match["layer"]))
        if match["part"] == "weight_scale":
            table.scales[key.removesuffix("_scale")] = key
        elif match["part"] == "input_scale":
            pass  # belongs to the activations; weights are dequantised, not run in FP8
        elif match["part"] == "bias":
            table.biases[place] = key
        else:
            (table.weights if match["linear"] else table.lm_heads)[place] = key
    orphan = next((s for w, s in table.scales.items() if w not in keys), None)
    if orphan:
        raise _extra_key(file, orphan)
    if letter == "A":
        table.letter = _digit_letter(table, file)
    return table


def _take_own(table: KeyTable, name: str, key: str) -> bool:
    """Sort a key that stands beside ``{head}.{layer}.linear.*``; False if it is none."""
    if name in ("token_id_remap", "token_map"):
        table.maps[name] = key
        return True
    match = _OWN.fullmatch(name)
    if match is None or (match["head"] is None) != (name == "lm_head.weight"):
        return False
    if match["head"] is None:
        table.common_lm_head = key
        return True
    head = int(match["head"])
    if match["part"] == "lm_head":
        table.lm_heads[head, 0] = key
    elif match["part"] == "lm_head_down":
        table.lm_heads_down[head] = key
    else:
        table.path_weights[head, int(match["place"])] = key
    table.named_lm_heads = table.named_lm_heads or match["part"] == "lm_head"
    return True


def _digit_letter(table: KeyTable, file: Path) -> str:
    named = table.named_lm_heads or table.common_lm_head or "token_map" in table.maps
    if named or table.lm_heads_down or table.path_weights:
        return "M"
    if table.maps:
        return "F"
    if not table.lm_heads:
        return "C2"
    return "C1" if file.suffix == ".safetensors" else "A"


def _classify_flat(keys: list[str], file: Path, config: Mapping[str, Any]) -> KeyTable:
    prefix = "medusa_heads." if any(key.startswith("medusa_heads.") for key in keys) else ""
    table = KeyTable(file, "D", prefix, flat=True)
    for key in keys:
        # vLLM writes the prefix on some keys only.
        name = key.removeprefix("medusa_heads.")
        if block := _BLOCK.fullmatch(name):
            places = table.biases if block["part"] == "bias" else table.weights
            places[int(block["head"]), int(block["layer"])] = key
        elif lm_head := _LM_HEAD.fullmatch(name):
            table.lm_heads[int(lm_head["head"]), 0] = key
        elif name == "lm_head.weight":
            table.common_lm_head = key
        elif name in MAP_KEYS:
            table.maps[name] = key
        else:
            raise _extra_key(file, key)
    speculators = any(name in config for name in SPECULATORS_CONFIG)
    if {"t2d", "d2t"} & set(table.maps) or (speculators and not table.maps):
        table.letter = "G"
    return table


def _extra_key(file: Path, key: str) -> CheckpointError:
    return CheckpointError(
        file, key, "a tensor that belongs to no head", "only layers, lm_heads and token maps",
        "remove it, or check that this is a Medusa checkpoint",
    )
