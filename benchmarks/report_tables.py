"""What all sections of README's results share: tables, devices, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from load import FINITE_BATCH

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def measured_table(
    text: str, path: Path, record: dict[str, Any], header: list[str], rows: list[list[str]]
) -> str:
    """What was measured, the record's name, its table and the command that made it."""
    return (
        f"{text} `{path.relative_to(ROOT)}`:\n\n{table(header, rows)}\n\n`{shown_command(record)}`"
    )


def device(record: dict[str, Any]) -> str:
    """Where a record was made."""
    provenance = record["provenance"]
    return (provenance["gpus"] or [provenance["processor"]])[0]


def load_of(record: dict[str, Any]) -> str:
    """The load under which a record was made; records from before there was a choice name none."""
    return record.get("load", FINITE_BATCH)


def filters_of(record: dict[str, Any]) -> str:
    """What left tokens out of the draw, to follow the temperature; records may name none.

    Examples
    --------
    >>> filters_of({"top_p": 0.9, "top_k": 20}), filters_of({"top_p": None})
    (', top-p 0.9, top-k 20', '')
    """
    names = {"top_p": "top-p", "top_k": "top-k"}
    given = {shown: record.get(name) for name, shown in names.items()}
    return "".join(f", {shown} {value:g}" for shown, value in given.items() if value is not None)


def median_of(values: dict[str, float]) -> str:
    """Median and, in brackets, extremes."""
    return f"{values['median']:.1f} ({values['min']:.1f}-{values['max']:.1f})"


def shown_command(record: dict[str, Any]) -> str:
    """The command of a record, without the directories of the machine that ran it."""
    words = record["provenance"]["command"]
    script = f"benchmarks/{Path(words[0]).name}"
    # Also inside a side's JSON: a path's last name is what follows its last slash.
    shown = (re.sub(r"(?:[^\s\"'=/]*/)+(?=[^\s\"'/])", "", word) for word in words[1:])
    return f"python {script} {shlex.join(shown)}".rstrip()
