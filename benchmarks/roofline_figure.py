"""README's roofline: the rate of every timed step under what the machine allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_tables import ROOT

FIGURES = ROOT / "benchmarks" / "figures"


def figure_of(path: Path) -> Path:
    """Where the figure of a record lies."""
    return FIGURES / f"{path.stem}.svg"


def _drawn_points(record: dict[str, Any]) -> list[dict[str, Any]]:
    shortest = min(point["context"] for point in record["points"])
    return [point for point in record["points"] if point["context"] == shortest]


def _numbers(record: dict[str, Any]) -> str:
    names = ("nodes", "requests", "context", "flops_per_byte", "tflops")
    kept = [[point[name] for name in names] for point in _drawn_points(record)]
    return json.dumps([record["bandwidth"], record["tflops"], kept])


def roofline_is_current(path: Path) -> bool:
    """Whether the figure of the record at ``path`` was drawn from what it says now."""
    figure = figure_of(path)
    return figure.exists() and _numbers(json.loads(path.read_text())) in figure.read_text()


def draw_roofline(record: dict[str, Any], path: Path) -> None:
    """Rate of every step over its operations per byte, under the roof; one line per width.

    The numbers lie in the figure as its description.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and the same numbers make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "medusa"})
    points = _drawn_points(record)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lowest = min(point["flops_per_byte"] for point in points)
    highest = max(point["flops_per_byte"] for point in points)
    corner = record["tflops"] / record["bandwidth"]
    ends = [lowest / 2, corner, max(2 * highest, 2 * corner)]
    roof = [min(record["tflops"], x * record["bandwidth"]) for x in ends]
    axes.plot(ends, roof, color="black", label="roof")
    for nodes in sorted({point["nodes"] for point in points}):
        own = [point for point in points if point["nodes"] == nodes]
        axes.plot(
            [p["flops_per_byte"] for p in own], [p["tflops"] for p in own], "o-",
            markersize=3, label="plain" if nodes == 0 else f"{nodes} node(s)",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.set_title(
        f"{record['label']}: decode steps of 1, 2, 4, .. requests, context {points[0]['context']}",
        fontsize=9,
    )
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_svg = path.suffix == ".svg"
    figure.savefig(
        path, metadata={"Date": None, "Description": _numbers(record)} if is_svg else None
    )
    pyplot.close(figure)
    print(f"wrote {path}")
