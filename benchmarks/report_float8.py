"""README's tables of drafts with float8 weights: what they cost and what they save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_tables import device, measured_table

PEERS = {"torch": "unquantised, cuBLAS", "marlin": "Marlin", "scaled_mm": "CUTLASS, both rounded"}


def float8_product_section(path: Path) -> str:
    """Microseconds of the product and of its peers."""
    record = json.loads(path.read_text())
    rows = []
    for row in record["rows"]:
        groups, outputs, size = row["weight"]
        ours = row["float8"]["median"]
        cells = (f"{row[name]['median']:.1f}" if name in row else "-" for name in PEERS)
        rate = groups * outputs * size / ours * 1e-6
        rows.append([_weight(row), f"{row['rows']}", f"{ours:.1f}", f"{rate:.2f}", *cells])
    header = ["weight", "rows", "float8", "its TB/s", *PEERS.values()]
    text = (
        f"**Products with float8 weights** at the shapes of an 8B model's heads on "
        f"{device(record)}, {record['dtype']} inputs, microseconds in one CUDA graph, L2 cold, "
        "measured in turns;"
    )
    return measured_table(text, path, record, header, rows)


def _weight(row: dict[str, Any]) -> str:
    groups, outputs, size = row["weight"]
    return f"{outputs} x {size}" if groups == 1 else f"{groups} of {outputs} x {size}"


def float8_heads_section(path: Path) -> str:
    """Tokens per step of heads as they are and rounded."""
    record = json.loads(path.read_text())
    rows = []
    for name, found in record["heads"].items():
        for row in found["rows"]:
            low, high = row["ratio_interval"]
            rows.append(
                [name, f"{row['nodes']}", f"{row['unquantised']:.3f}", f"{row['float8']:.3f}",
                 f"{row['ratio']:.4f} ({low:.4f}-{high:.4f})"]
            )  # fmt: skip
    text = (
        f"**Heads rounded to float8**, {record['model']}, tokens per step of trees chosen at every "
        f"step on {record['num_questions']} greedy answers to MT-Bench ({record['answer_tokens']:,}"
        f" tokens), simulated exactly in {record['dtype']}; layers and the lm_head's first "
        f"{record['draft_vocab_size']:,} rows are rounded; ratio with its 95 % interval over "
        "questions;"
    )
    header = ["heads", "nodes", "unquantised", "float8", "ratio"]
    return measured_table(text, path, record, header, rows)
