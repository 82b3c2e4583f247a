"""README's tables of kernels against their peers, of a profiler's counters and of checks."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from report_tables import device, measured_table

PEERS = {
    "triton-qq-bias": "vLLM Triton, bias", "flashinfer": "FlashInfer, custom mask",
    "xformers": "xformers, pages of 64", "fa3-causal": "FA3, chain",
    "fa3+tree": "FA3 + tree part",
}  # fmt: skip


def short(shape: dict[str, int]) -> str:
    """A shape in a table's cell."""
    heads = f"{shape['heads']}/{shape['kv_heads']} x {shape['head_size']}"
    return f"{shape['batch']}, {shape['context']}, {shape['rows']}, {heads}"


def peers_section(path: Path) -> str:
    """How much longer each peer takes, over all shapes; records of single shapes have no such."""
    record = json.loads(path.read_text())
    if record["benchmark"] != "tree_attention_peers":
        return ""
    rows = []
    for name, title in PEERS.items():
        entries = [(row, row["kernels"][name]) for row in record["rows"] if name in row["kernels"]]
        if not entries:
            continue
        ratios = {
            short(row["shape"]): entry["median"] / row["kernels"]["tree"]["median"]
            for row, entry in entries
            if "median" in entry and "median" in row["kernels"]["tree"]
        }
        failed = sum("failed" in entry for _, entry in entries)
        if not ratios:
            rows.append([title, "0", f"{failed}", "-", "-", "-", "-"])
            continue
        worst = min(ratios, key=ratios.__getitem__)
        faster = sum(ratio > 1 for ratio in ratios.values())
        close = sum(ratio >= 1 / 1.05 for ratio in ratios.values())
        spread = [min(ratios.values()), statistics.median(ratios.values()), max(ratios.values())]
        rows.append(
            [title, f"{len(ratios)}", f"{failed}", f"{faster}", f"{close}",
             " / ".join(f"{ratio:.2f}" for ratio in spread), worst]
        )  # fmt: skip
    header = [
        "peer", "shapes", "refused", "tree kernel faster", "at most 1.05 times as long",
        "peer's time over the tree kernel's: least / median / most",
        "least: requests, context, rows, heads",
    ]  # fmt: skip
    text = (
        f"**Tree attention over the sweep** on {device(record)}: {len(record['rows'])} shapes of 1 "
        "to 64 requests, contexts of 128 to 32,768 and 8 to 64 rows, measured in turns as above;"
    )
    return measured_table(text, path, record, header, rows)


def counters_section(path: Path) -> str:
    """What bounds each kernel."""
    record = json.loads(path.read_text())
    fields = (
        "microseconds", "registers", "reached_occupancy_percent", "dram_percent", "l2_percent",
        "tensor_percent", "issue_percent",
    )  # fmt: skip
    rows = []
    for kernel in record["kernels"]:
        cells = [f"{kernel['case']}: `{kernel['kernel'][:24]}`"]
        for field in fields:
            value = kernel.get(field)
            cells.append(
                "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
            )
        waits = [
            f"{name} {cycles:.1f}" for name, cycles in list(kernel.get("waits", {}).items())[:3]
        ]
        rows.append([*cells, ", ".join(waits)])
    header = [
        "case and kernel", "us", "registers", "occupancy %", "DRAM %", "L2 %", "tensor cores %",
        "issue slots %", "cycles waited per instruction",
    ]  # fmt: skip
    text = (
        f"**Counters of Nsight Compute** on {device(record)}, each kernel alone with cold caches; "
        "shares of the hardware's peaks;"
    )
    return measured_table(text, path, record, header, rows)


def sanitizer_section(path: Path) -> str:
    """What compute-sanitizer found."""
    record = json.loads(path.read_text())
    rows = [
        [one["tool"], one["tests"] or "did not end", one["summary"] or "-"]
        for one in record["tools"]
    ]  # fmt: skip
    text = f"**Kernel tests under compute-sanitizer** on {device(record)};"
    return measured_table(text, path, record, ["tool", "tests", "summary"], rows)


def overlaps_section(path: Path) -> str:
    """Random KV moves against the definition."""
    record: dict[str, Any] = json.loads(path.read_text())
    return (
        f"**Random overlapping KV moves** on {device(record)}: {record['bit_exact_cases']:,} cases "
        f"in {record['launches']} launches, every byte of the caches as the definition has it; "
        f"`benchmarks/results/{path.name}`.\n\n"
        "`pytest -m long tests/kernels/test_kv_compaction.py -k million_random_overlaps_kernel "
        "--records benchmarks/results`"
    )
