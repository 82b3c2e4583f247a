"""README's table of drafts that know the sampler's noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_tables import measured_table


def coupled_drafts_section(path: Path) -> str:
    """Tokens per step of drafts by the heads alone and with the noise, by kind of tree."""
    record = json.loads(path.read_text())
    kinds = [name for name in _first_row(record) if name != "nodes"]
    rows = [
        [name, f"{row['nodes']}", *(cell for kind in kinds for cell in _cells(row[kind]))]
        for name, found in record["heads"].items()
        for row in found["rows"]
    ]
    text = (
        f"**Drafts that know the noise of the draw**, {record['model']}, tokens per step on "
        f"{record['num_questions']} answers to MT-Bench that plain vLLM drew at temperature "
        f"{record['temperature']:g} ({record['answer_tokens']:,} tokens, {record['redrawn']:.2%} "
        f"drawn again from the model's own logits), simulated exactly in {record['dtype']}: by the "
        "heads alone, coupled to the noise, and the ratio with its 95 % interval over questions; "
        f"heads score the first {record['draft_vocab_size']:,} ids, noisy sums are divided by "
        f"{record['spread']:g};"
    )
    header = ["heads", "nodes", *(c for kind in kinds for c in (kind, "coupled", "ratio"))]
    return measured_table(text, path, record, header, rows)


def _first_row(record: dict[str, Any]) -> dict[str, Any]:
    return next(iter(record["heads"].values()))["rows"][0]


def _cells(pair: dict[str, Any]) -> tuple[str, str, str]:
    low, high = pair["ratio_interval"]
    ratio = f"{pair['ratio']:.3f} ({low:.3f}-{high:.3f})"
    return f"{pair['alone']:.3f}", f"{pair['coupled']:.3f}", ratio
