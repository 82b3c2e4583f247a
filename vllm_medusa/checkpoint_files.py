"""TensorSource: the files of a checkpoint, found anywhere and read key by key."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_medusa.checkpoint_error import CheckpointError

logger = logging.getLogger(__name__)

HEADS_FILE = "medusa_lm_head.safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin")

# Most specific first: a TGI or Predibase directory may hold an adapter beside
# the heads, a Medusa-2 directory holds the base model as well.
KNOWN_FILES = (
    HEADS_FILE,
    "medusa_lm_head.pt",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

# Of one file; what common file systems take.
MOST_NAME_LENGTH = 255

# The index of a model of a thousand shards is a few megabytes.
MOST_JSON_BYTES = 64 << 20

_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


class TensorSource:
    """Tensors of one checkpoint, spread over one or more files.

    Parameters
    ----------
    path
        What the user named, for messages.
    directory
        Where config.json and tree.json are looked for.
    key_files
        Tensor key -> file that holds it.
    """

    def __init__(self, path: Path, directory: Path, key_files: Mapping[str, Path]) -> None:
        self.path = path
        self.directory = directory
        self.key_files = dict(key_files)
        self.config = read_json(directory / "config.json")
        tree_path = directory / "tree.json"
        self.tree_path = tree_path if tree_path.is_file() else None
        self._opened: dict[Path, Any] = {}

    def file_of(self, key: str) -> Path:
        """Return the file that holds ``key``, or should hold it."""
        return self.key_files.get(key, self.path)

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor; only its bytes are touched."""
        file = self.key_files[key]
        if file not in self._opened:
            self._opened[file] = open_tensors(file)
        opened = self._opened[file]
        try:
            tensor = opened[key] if isinstance(opened, dict) else opened.get_tensor(key)
        except (KeyError, SafetensorError) as error:
            raise CheckpointError(
                file, key, "no such tensor", "the tensor that the index names",
                f"download the checkpoint again ({error})",
            ) from None
        return tensor


def find_source(path: str | Path) -> TensorSource:
    """Locate a checkpoint: directory, file, shard index or Hugging Face hub id."""
    try:
        local = Path(path).expanduser()
        is_folder, is_file = local.is_dir(), local.is_file()
    except (OSError, RuntimeError) as error:  # name too long, no access, no such user
        raise CheckpointError(
            path, None, f"a path that cannot be looked up ({error})", "a checkpoint",
            "give a directory, a .safetensors or .pt file, or a hub id such as owner/name",
        ) from None
    if is_folder:
        return _open_file(local, _pick_file(local))
    if is_file:
        return _open_file(local, local)
    match = _HUB_ID.fullmatch(str(path))
    if match is None or str(path).endswith((*PICKLE_SUFFIXES, ".safetensors")):
        raise CheckpointError(
            path, None, "no such file or directory", "a checkpoint",
            "give a directory, a .safetensors or .pt file, or a hub id such as owner/name",
        )
    directory = _download(match["repo"], match["revision"])
    return _open_file(directory, _pick_file(directory))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON mapping, {} when the file does not exist."""
    if not path.is_file():
        return {}
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise CheckpointError(
            path, None, f"{size} bytes", f"JSON of at most {MOST_JSON_BYTES} bytes",
            "repair or remove the file",
        )
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            path, None, f"unreadable JSON ({error})", "a JSON mapping", "repair or remove the file"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            path, None, f"a {type(content).__name__}", "a JSON mapping", "repair the file"
        )
    return content


def open_tensors(file: Path) -> Any:
    """Open a safetensors file lazily, or a pickle of tensors as a dict."""
    if not file.is_file():
        raise CheckpointError(
            file, None, "no such file", "the shard that the index names",
            "download the checkpoint again",
        )
    if file.suffix not in PICKLE_SUFFIXES:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError, MemoryError) as error:
            raise CheckpointError(
                file, None, f"a damaged or truncated file of {file.stat().st_size} bytes ({error})",
                "a complete safetensors file", "download or copy it again",
            ) from None
    return _read_pickle(file)


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    logger.warning(
        "%s is a pickle; it was read with weights_only=True. Run `vllm-medusa convert` to turn it "
        "into safetensors.", file
    )
    try:
        _check_archive(file)
        # Mapped, so that a tensor cannot claim more bytes than its record has.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damage makes the unpickler raise anything, KeyError to IndexError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            file, None, f"a pickle that cannot be read safely ({reason})",
            "a state dict of tensors only", "get a safetensors copy, or download it again",
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            file, None, f"a pickled {type(content).__name__}", "a state dict of tensors",
            "save `medusa_head.state_dict()` instead of the object",
        )
    for key, value in content.items():
        what = _what_is_wrong(key, value)
        if what:
            raise CheckpointError(
                file, str(key), what, "the name and values of a tensor",
                "save the heads' state dict alone",
            )
    return content


def _check_archive(file: Path) -> None:
    """Only archives as torch.save writes them: others can claim to be larger than they are."""
    if not zipfile.is_zipfile(file):
        raise ValueError("not the zip format of torch.save since PyTorch 1.6")
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("compressed records, which torch.save never writes")


def _what_is_wrong(key: Any, value: Any) -> str | None:
    """Why an entry of a state dict is no plain tensor in memory, None when it is one."""
    if not isinstance(key, str):
        return f"a key of type {type(key).__name__}"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return f"a tensor of layout {value.layout} on {value.device}, quantised or without values"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"shape {list(value.shape)} over {value.untyped_storage().nbytes()} bytes"
    return None


def _open_file(path: Path, file: Path) -> TensorSource:
    if file.name.endswith(".index.json"):
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                file, "weight_map", repr(weight_map), "tensor names and shard files",
                "download the checkpoint again",
            )
        for key, shard in weight_map.items():
            _check_shard_name(file, key, shard)
        return TensorSource(
            path, file.parent, {key: file.parent / shard for key, shard in weight_map.items()}
        )
    if file.suffix not in (*PICKLE_SUFFIXES, ".safetensors"):
        raise CheckpointError(
            file, None, f"a file ending in {file.suffix!r}",
            ".safetensors, .pt, .pth, .bin or .index.json",
            "give the weights file or its directory",
        )
    opened = open_tensors(file)
    source = TensorSource(path, file.parent, dict.fromkeys(opened.keys(), file))
    source._opened[file] = opened
    return source


def _check_shard_name(index: Path, key: str, shard: Any) -> None:
    """A shard is a weights file in the index's own directory or below."""
    if (
        not isinstance(shard, str)
        or not shard.endswith((*PICKLE_SUFFIXES, ".safetensors"))
        or not shard.isprintable()
        or len(shard) > MOST_NAME_LENGTH
        or Path(shard).is_absolute()
        or ".." in Path(shard).parts
    ):
        raise CheckpointError(
            index, key, f"the shard {str(shard)[:MOST_NAME_LENGTH]!r}",
            "a weights file in the same directory", "download the checkpoint again",
        )


def _pick_file(directory: Path) -> Path:
    present = [name for name in KNOWN_FILES if (directory / name).is_file()]
    if present:
        ignored = [name for name in present[1:] if name.startswith("medusa")]
        if ignored:
            logger.warning("%s: reading %s, not %s", directory, present[0], ", ".join(ignored))
        return directory / present[0]
    others = sorted(
        file.name
        for file in directory.iterdir()
        if file.suffix in (*PICKLE_SUFFIXES, ".safetensors")
    )
    if len(others) == 1:
        return directory / others[0]
    contents = sorted(file.name for file in directory.iterdir())
    raise CheckpointError(
        directory, None, f"weights files {others}" if others else f"no weights file in {contents}",
        f"one of {', '.join(KNOWN_FILES)}, or exactly one other weights file",
        "give the path of the weights file itself",
    )


def _download(repo: str, revision: str | None) -> Path:
    # Metadata and small head files first; of a whole model only the shards that
    # hold heads (5 GB of 15 for Vicuna-7B) and never both weight formats.
    directory = _fetch(repo, revision, ["*.json", "medusa_lm_head.*"])
    present = {file.name for file in directory.iterdir()}
    if present & set(KNOWN_FILES[:2]):
        return directory
    for name in KNOWN_FILES[2:]:
        if name in present and name.endswith(".index.json"):
            weight_map = read_json(directory / name).get("weight_map", {})
            shards = {shard for key, shard in weight_map.items() if key.startswith("medusa_head")}
            return _fetch(repo, revision, ["*.json", *sorted(shards)])
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        directory = _fetch(repo, revision, ["*.json", pattern])
        if any(directory.glob(pattern)):
            break
    return directory


def _fetch(repo: str, revision: str | None, patterns: Iterable[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            repo, None, "no such path", "a local checkpoint",
            "install huggingface_hub to download by hub id",
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns)
            )
        )
    # Every cause (offline, unknown repository, gated, disk) ends in the same advice.
    except Exception as error:
        raise CheckpointError(
            repo, None, f"no such path, and the hub gave no checkpoint ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'})",
            "a local checkpoint or a reachable hub id",
            "check the spelling, log in, or download it elsewhere and give the directory",
        ) from error
