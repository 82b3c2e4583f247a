"""Result records: one JSON file per run, with what is needed to make it again."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from vllm_medusa.provenance import collect_provenance


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and count of repeated measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "mean": statistics.mean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
        "count": len(values),
    }


def earlier_record(path: Path, head: dict[str, Any]) -> dict[str, Any] | None:
    """The record that a run goes on with, None where there is none yet.

    Raises
    ------
    ValueError
        What all its rows have in common (``head``, JSON types only) differs there.
    """
    if not path.exists():
        return None
    old = json.loads(path.read_text())
    for name, value in head.items():
        if old.get(name) != value:
            raise ValueError(
                f"{path}: {name} is {old.get(name)!r} there and {value!r} now; choose another --out"
            )
    return old


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` with provenance (command, commit, device, versions) as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"provenance": collect_provenance(), **record}
    path.write_text(json.dumps(document, indent=2, sort_keys=False) + "\n")
    print(f"wrote {path}")
