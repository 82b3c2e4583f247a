"""README's tables of trained heads and of training speed, from their records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_tables import ROOT, device, measured_table, table
from training_flop import base_flop, head_flop

BUDGETS = ("8", "16", "32", "63")
_KINDS = (("static", "one tree"), ("dynamic", "chosen at every step"))


def _kind_of_heads(row: dict[str, Any]) -> str:
    kind = "sequential" if row["sequential"] else "independent"
    return f"{row['num_heads']} {kind}, {row['num_layers']} block(s)"


def _tree_rows(name: str, row: dict[str, Any]) -> list[list[str]]:
    found = row["trees"]["mt_bench"]
    rows = []
    for kind, words in _KINDS:
        if kind not in found:
            continue
        low, high = found[kind][BUDGETS[-1]]["interval"]
        cells = [f"{found[kind][n]['tokens_per_step']:.2f}" for n in BUDGETS]
        rows.append([name, _kind_of_heads(row), words, *cells, f"{low:.2f}-{high:.2f}"])
    return rows


def compared_heads_section(path: Path) -> str:
    """Tokens per step of every kind of heads and of trees."""
    record = json.loads(path.read_text())
    variants = record["variants"]
    rows = [
        row for name, found in variants.items() if "trees" in found
        for row in _tree_rows(name, found)
    ]  # fmt: skip
    tokens = [v["trees"]["mt_bench"]["answer_tokens"] for v in variants.values() if "trees" in v]
    if not rows:
        return ""
    text = (
        f"**Kinds of heads and trees**, {record['model']} on {device(record)}, tokens per step on "
        f"the model's greedy answers to {record['num_questions']} MT-Bench questions (first "
        f"turns, at most {record['max_tokens']} tokens, {tokens[0]:,} in all; Medusa-2: the "
        "changed model's), simulated exactly, by nodes, with the 95 % interval over questions at "
        "63; trees searched on own answers that were not trained on;"
    )
    header = ["heads", "kind", "tree", *(f"{n} nodes" for n in BUDGETS), "interval"]
    return measured_table(text, path, record, header, rows) + _quality(variants)


def _quality(variants: dict[str, Any]) -> str:
    """What joint training did to the base."""
    found = [
        f"{name} changes the base's cross entropy on held-out answers by "
        f"{row['nats_above_the_base']:+.4f} nats a token"
        for name, row in variants.items() if "nats_above_the_base" in row
    ]  # fmt: skip
    return f"\n\n{'; '.join(found)}." if found else ""


def training_section(path: Path) -> str:
    """What was trained, how fast, and the losses on held-out answers."""
    record = json.loads(path.read_text())
    rows = [
        [
            name, _kind(row), _million_tokens(row), f"{row['steps']:,}", f"{row['seconds']:.0f}",
            f"{row['tokens_per_second'] / 1e3:,.0f}k", _gib(row), _last_training_loss(row),
            " ".join(f"{x:.2f}" for x in row["held_out_losses"]), _best(row),
        ]
        for name, row in record["variants"].items() if "steps" in row and "held_out_losses" in row
    ]  # fmt: skip
    if not rows:
        return ""
    text = (
        f"**Training**, {record['model']} on {device(record)}, by data and size of the heads "
        f"({record['training_rows'] / 1e6:.1f} million own answer tokens in all, batches of "
        "16,384, Medusa-1 on hidden states in memory): cross entropy of head 1 at the end of "
        "training and of heads 1, 2, .. on answers to other prompts, in nats, and tokens per step "
        "on MT-Bench with one tree of 63 nodes;"
    )
    header = [
        "heads", "kind", "million tokens", "steps", "seconds", "tokens/s", "peak GiB",
        "head 1, training", "held-out cross entropy", "tokens per step",
    ]  # fmt: skip
    return measured_table(text, path, record, header, rows)


def _kind(row: dict[str, Any]) -> str:
    return _kind_of_heads({**row["config"], **row})


def _million_tokens(row: dict[str, Any]) -> str:
    return f"{row['training_rows'] / 1e6:.1f}" if "training_rows" in row else "-"


def _last_training_loss(row: dict[str, Any]) -> str:
    # Joint training logs rows with names, Medusa-1 (step, rate, losses).
    last = row["history"][-1] if row.get("history") else None
    losses = last.get("head_losses") if isinstance(last, dict) else last and last[2]
    return f"{losses[0]:.2f}" if losses else "-"


def _gib(row: dict[str, Any]) -> str:
    return f"{row['peak_gpu_memory_gib']:.1f}" if "peak_gpu_memory_gib" in row else "-"


def _best(row: dict[str, Any]) -> str:
    found = row.get("trees", {}).get("mt_bench", {}).get("static", {})
    return f"{found['63']['tokens_per_step']:.2f}" if "63" in found else "-"


def training_speed_section(path: Path) -> str:
    """Tokens/s, products and peak memory of both trainers."""
    record = json.loads(path.read_text())
    rows = []
    for row in record["rows"]:
        what = row["mode"]
        if "base_parameters" in row:
            what += f", base of {row['base_parameters'] / 1e9:.1f} billion parameters"
            what += "" if row["compiled_base"] else " (not compiled)"
            what += f", {row['conversations_a_step']} conversations a step"
        kind = _kind_of_heads({"sequential": False, **row})
        kind += "" if row.get("lm_head", "shared") == "shared" else f", {row['lm_head']} lm_heads"
        shape = f"{row['hidden_size']} x {row['vocab_size']}"
        flop, speed = head_flop(row) + base_flop(row), row["tokens_per_second"]
        rows.append([what, kind, shape, f"{speed / 1e3:,.0f}k", f"{flop / 1e9:.1f}",
                     f"{speed * flop / 1e12:.0f}", _gib(row)])  # fmt: skip
    text = (
        f"**Training speed** on {device(record)}, answer tokens a second, products of one of them "
        "(`benchmarks/training_flop.py`) and peak memory, random weights"
    )
    commits = {row.get("git_sha") for row in record["rows"]}
    text += ", rows of several calls, the last of which is shown;" if len(commits) > 1 else ";"
    header = [
        "hidden states", "heads", "hidden x vocabulary", "tokens/s", "GFLOP a token", "TFLOP/s",
        "peak GiB",
    ]  # fmt: skip
    return measured_table(text, path, record, header, rows)


def heads_section(heads: Path) -> str:
    """What the shipped heads reach by their own record."""
    record = json.loads((heads / "training.json").read_text())
    found = record["mt_bench"]["tokens_per_step"]
    rows = [[str(nodes), f"{value:.2f}"] for nodes, value in found.items()]
    return (
        "**Shipped heads** (SmolLM2-135M-Instruct, shared lm_head), tokens per step on the 80 "
        "MT-Bench questions, simulated exactly under greedy verification, by node budget; "
        f"`{(heads / 'training.json').relative_to(ROOT)}`:\n\n"
        + table(["nodes", "tokens per step"], rows)
    )


def sequential_draft_section(path: Path) -> str:
    """Drafting with sequential heads, level by level."""
    record = json.loads(path.read_text())
    rows = []
    sides = {"score": "launches", "float8": "float8_launches", "peer": "peer_launches"}
    for row in record["rows"]:
        shape = row["shape"]
        times = (
            f"{row[side]['median']:.0f} ({sum(kernel['launches'] for kernel in row[key]):g})"
            if side in row else "-"
            for side, key in sides.items()
        )  # fmt: skip
        rows.append(
            [
                f"{shape['batch']}", f"{shape['ids']}, {shape['later_ids']}",
                " ".join(map(str, row["rows_by_level"])), f"{row['floor_us']:.0f}", *times,
            ]
        )  # fmt: skip
    header = [
        "requests", "ids of the first and the other heads", "rows of each level", "floor",
        "draft (launches)", "in float8 (launches)", "PyTorch (launches)",
    ]  # fmt: skip
    text = (
        f"**Drafting with sequential heads** of {record['rows'][0]['shape']['hidden']} columns on "
        f"{device(record)}, one CUDA graph, microseconds; the floor is reading all weights once a "
        "level at 3.0 TB/s;"
    )
    return measured_table(text, path, record, header, rows)
