"""README's tables of whole engines: head to head, widths, first tokens, steps and their kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cases import Case, case_of
from report_tables import ROOT, device, filters_of, load_of, measured_table
from roofline_figure import figure_of


def commits(record: dict[str, Any]) -> str:
    """Commits of a record's cells."""
    found = dict.fromkeys((cell["git_sha"] or "unknown")[:10] for cell in record["cells"])
    return f"commit {', '.join(found)}"


def ratio(values: dict[str, float], digits: int = 2) -> str:
    """Median and, in brackets, extremes of a ratio."""
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low}-{high})"


def mean_ratio(values: dict[str, float]) -> str:
    """Mean of a ratio near 1 with its standard error."""
    return f"{values['mean']:.4f} ± {values['stdev'] / values['count'] ** 0.5:.4f}"


def compare_section(path: Path) -> str:
    """Every kind of speculation against plain vLLM; the fastest at each concurrency is bold."""
    record = json.loads(path.read_text())
    cells = [cell for cell in record["cells"] if "failed" not in cell]
    failed = [cell for cell in record["cells"] if "failed" in cell]
    best: dict[Case, float] = {}
    for cell in cells:
        case = case_of(cell)
        best[case] = max(best.get(case, 1.0), cell["speedup"]["median"])
    heats = sorted({case.temperature for case in best})
    rows = []
    for cell in sorted(
        cells,
        key=lambda cell: (case_of(cell)[::-1], -cell["speedup"]["median"]),
    ):
        case, same = case_of(cell), cell["agreement"]
        parted = same and same["first_divergences"]
        speed, gain = ratio(cell["speedup"]), cell["speedup"]["median"]
        rows.append(
            [
                *([f"{case.temperature:g}"] if len(heats) > 1 else []),
                str(case.concurrency), cell["key"]["side"],
                f"{cell['tokens_per_s']['median']:.1f}",
                f"**{speed}**" if gain == best[case] else speed,
                f"{cell['tokens_per_step']:.2f}", f"{gain / cell['tokens_per_step']:.2f}",
                f"{cell['step_ms']['median']:.2f} ({cell['plain_step_ms']['median']:.2f})",
                f"{same['identical']} of {same['first_turns_compared']}" if same else "-",
                str(parted[0]["position"]) if parted else "-",
            ]
        )  # fmt: skip
    header = [
        *(["temperature"] if len(heats) > 1 else []),
        "requests at once", "contender", "tok/s", "speed-up over plain", "tokens per step",
        "speed-up / tokens per step", "ms a step (plain)", "answers identical to plain",
        "first to part at token",
    ]  # fmt: skip
    at = "" if len(heats) > 1 else f", temperature {', '.join(f'{heat:g}' for heat in heats)}"
    left_out = "; ".join(f"{cell['key']['side']}: {cell['failed']}" for cell in failed)
    text = (
        f"**Head to head, {record['label']} on {device(record)}**, first turns of MT-Bench, "
        f"{load_of(record)}, at most {record['max_tokens']} tokens{at}"
        f"{filters_of(record)}, {record['rounds']} rounds, {record['order']}; {commits(record)};"
    )
    notes = f"\n\nNot measured: {left_out}." if left_out else ""
    return measured_table(text, path, record, header, rows) + notes


def widths_section(path: Path) -> str:
    """The adaptive choice against every fixed tree."""
    record = json.loads(path.read_text())
    rows = []
    for cell in sorted(
        record["cells"], key=lambda cell: (cell["key"]["context"], cell["key"]["concurrency"])
    ):
        key, widths = cell["key"], cell["widths"]
        fixed = [
            f"{widths[str(n)]['tokens_per_s']['median']:.0f}" if str(n) in widths else "-"
            for n in record["nodes"]
        ]
        chosen = dict.fromkeys(str(state["nodes"]) for state in cell["chosen"])
        rows.append(
            [
                str(key["context"]), str(key["concurrency"]), *fixed,
                f"{widths['adaptive']['tokens_per_s']['median']:.0f}", " ".join(chosen),
                f"{cell['adaptive_over_best_fixed']:.2f}",
            ]
        )  # fmt: skip
    header = [
        "context", "requests at once", *(f"{n} nodes" for n in record["nodes"]), "adaptive",
        "it chose", "adaptive / best fixed",
    ]  # fmt: skip
    text = (
        f"**Adaptive choice against fixed trees, {record['label']} on {device(record)}**, tok/s, "
        "one engine held at each width; prompts of MT-Bench questions and the model's own "
        f"answers, {load_of(record)}, {record['max_tokens']} tokens each; each width one short "
        f"round, then medians of {record['rounds']} rounds in which the adaptive choice and the "
        f"best {record['finalists']} widths take turns; {commits(record)};"
    )
    return measured_table(text, path, record, header, rows)


def latency_section(path: Path) -> str:
    """Time to the first token; the plugin where it is off."""
    record = json.loads(path.read_text())
    rows = []
    for cell in sorted(record["cells"], key=lambda cell: cell["key"]["concurrency"]):
        for name, side in cell["sides"].items():
            first, speed = side["first_token_ms"], side["tokens_per_s"]
            later = cell["first_token_over_first_side"].get(name)
            over = cell["rate_over_first_side"].get(name)
            rows.append(
                [
                    str(cell["key"]["concurrency"]), name, f"{first['median']:.1f}",
                    f"{first['p90']:.1f}", "1" if later is None else ratio(later, 3),
                    "-" if speed is None else f"{speed['median']:.1f}",
                    "-" if speed is None else "1" if over is None else mean_ratio(over),
                ]
            )  # fmt: skip
    base = record["sides"][0]
    header = [
        "requests at once", "engine", "first token, ms: median", "p90", f"over {base}",
        "tok/s", f"over {base}: mean",
    ]  # fmt: skip
    text = (
        f"**Time to the first token, {record['label']} on {device(record)}**, streamed, first "
        f"turns of MT-Bench, {load_of(record)}, {record['rounds']} rounds in turns; *stock* is "
        "vLLM without the plugin (`VLLM_PLUGINS=''`), *plugin off* has it installed; "
        f"{commits(record)};"
    )
    return measured_table(text, path, record, header, rows)


def roofline_section(path: Path) -> str:
    """Milliseconds of a step, and the share of them that the machine needs."""
    record = json.loads(path.read_text())
    shortest = min(point["context"] for point in record["points"])
    found = {
        (point["nodes"], point["requests"]): point
        for point in record["points"]
        if point["context"] == shortest
    }
    sizes = sorted({requests for _, requests in found})
    rows = [
        [
            str(nodes),
            *(
                f"{p['ms']:.2f} ({p['floor_ms'] / p['ms']:.0%})" if p else "-"
                for p in (found.get((nodes, requests)) for requests in sizes)
            ),
        ]
        for nodes in sorted({nodes for nodes, _ in found})
    ]
    text = (
        f"**Decode steps against the roofline, {record['label']} on {device(record)}**, "
        f"milliseconds at context {shortest} and, in brackets, the floor's share: the larger of "
        f"bytes at {record['bandwidth']} TB/s and products at {record['tflops']:.0f} TFLOP/s;"
    )
    header = ["nodes", *(f"{requests} at once" for requests in sizes)]
    plain, widest = found.get((0, 1)), found.get((max(nodes for nodes, _ in found), 1))
    told = ""
    if plain and widest:
        told = (
            f"\n\nOne request, empty steps as the engine times them at start: one of "
            f"{widest['nodes']} nodes takes {widest['ms'] / plain['ms']:.3f} times a plain one."
        )
    figure = figure_of(path).relative_to(ROOT)
    return f"{measured_table(text, path, record, header, rows)}{told}\n\n![Roofline]({figure})"


def profile_section(path: Path) -> str:
    """What the kernels of a decode step take, and the heads' share."""
    record = json.loads(path.read_text())
    pure = {
        (int(level), name): found["pure"]
        for name, side in record["sides"].items()
        for level, found in side.items()
        if "pure" in found
    }
    kinds = sorted({kind for part in pure.values() for kind in part["by_kind_us"]})
    rows = []
    for (level, name), part in sorted(pure.items()):
        step, spent = part["step_us"]["median"], part["by_kind_us"]
        plain = pure.get((level, "plain"))
        heads = spent.get("heads", 0.0) + spent.get("draft", 0.0)
        rows.append(
            [
                str(level), name, f"{step / 1e3:.2f}",
                f"{step / plain['step_us']['median']:.3f}" if plain else "-",
                *(f"{spent[kind]:.0f}" if kind in spent else "-" for kind in kinds),
                f"{heads / step:.1%}",
            ]
        )  # fmt: skip
    asked = (
        f"{record['questions']} MT-Bench questions"
        if record["questions"]
        else f"prompts of {record['prompt_tokens']} tokens"
    )
    text = (
        f"**Where a decode step goes, {record['label']} on {device(record)}**, {asked}, "
        f"{record['tokens']} tokens each, microseconds of kernels by what they serve (medians of "
        "steps without a prompt, under the profiler);"
    )
    header = [
        "requests at once", "engine", "ms a step", "over plain", *kinds,
        "heads and drafting, share of the step",
    ]  # fmt: skip
    return measured_table(text, path, record, header, rows)
