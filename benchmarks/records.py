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


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` with provenance (command, commit, device, versions) as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"provenance": collect_provenance(), **record}
    path.write_text(json.dumps(document, indent=2, sort_keys=False) + "\n")
    print(f"wrote {path}")
