"""README's learning curve: tokens per step against training data and size of the heads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_tables import RESULTS, ROOT, table

FIGURE = ROOT / "benchmarks" / "figures" / "learning_curve.svg"
# What the best heads were to reach with at most 63 nodes, and the nodes.
GOAL, NODES = 3.0, "63"
# SmolLM2-135M, the lm_head tied to the embeddings.
MODEL_PARAMETERS = 134_515_008
# Runs of equal steps that differ in their data alone.
CURVE = ("sequential-data-1-of-16", "sequential-data-1-of-4", "sequential-data-all")
# Name in the record of the CPU -> name under which the heads were trained. One data, three sizes.
SIZES = {
    "medusa-1": "medusa-1", "plain-3-blocks": "plain-3-blocks",
    "smollm2-135m-instruct-sequential": "sequential",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Heads, what they were trained on and what they reach."""

    name: str
    parameters: int
    sequential: bool
    # millions of answer tokens: different ones, all that were trained on, passes where known
    tokens: float
    seen: float
    passes: float | None
    # tokens per step on MT-Bench with its 95 % interval, and on own answers to other prompts
    mt_bench: float
    interval: tuple[float, float]
    own: float | None

    @property
    def share(self) -> float:
        """Parameters in percent of the model's."""
        return 100 * self.parameters / MODEL_PARAMETERS


def _point(name: str, trained: dict[str, Any], tested: dict[str, Any]) -> Point:
    trees = tested["trees"]
    found = trees["mt_bench"]["static"][NODES]
    own = trees.get("held_out", {}).get("static", {}).get(NODES)
    return Point(
        name, trained["parameters"], tested["sequential"],
        trained.get("training_rows", trained["tokens"]) / 1e6, trained["tokens"] / 1e6,
        trained.get("epochs_seen"), found["tokens_per_step"], tuple(found["interval"]),
        own and own["tokens_per_step"],
    )  # fmt: skip


def read_points(folder: Path = RESULTS) -> tuple[list[Point], list[Point]]:
    """Points by data, tested on an H100, and by size, tested on a CPU."""
    gpu, first, cpu = (
        json.loads((folder / f"{name}.json").read_text())["variants"]
        for name in ("h100_head_variants", "h100_head_variants_medusa_1", "cpu_compared_heads")
    )
    # Heads that were trained before and evaluated again have no tokens in the later record.
    by_data = [
        _point(name, row if "tokens" in row else first[name], row)
        for name, row in gpu.items() if "trees" in row
    ]  # fmt: skip
    by_size = [_point(trained, first[trained], cpu[name]) for name, trained in SIZES.items()]
    return by_data, by_size


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares rise of y for every doubling of x.

    >>> slope([(1, 2.0), (2, 2.5), (4, 3.0)])
    0.5
    """
    xs, ys = [math.log2(x) for x, _ in points], [y for _, y in points]
    middle = sum(xs) / len(xs)
    rise = sum((x - middle) * y for x, y in zip(xs, ys, strict=True))
    return rise / sum((x - middle) ** 2 for x in xs)


def _row(point: Point, where: str) -> list[str]:
    kind = "sequential" if point.sequential else "independent"
    low, high = point.interval
    return [
        point.name, kind, f"{point.parameters / 1e6:.1f} ({point.share:.1f} %)",
        f"{point.tokens:.1f}", "-" if point.passes is None else f"{point.passes:.1f}", where,
        f"{point.mt_bench:.2f}", f"{low:.2f}-{high:.2f}",
        "-" if point.own is None else f"{point.own:.2f}",
    ]  # fmt: skip


def learning_curve_section(folder: Path = RESULTS) -> str:
    """Figure, table and what a doubling of the data gives."""
    by_data, by_size = read_points(folder)
    rows = [_row(p, "H100") for p in by_data] + [_row(p, "CPU") for p in by_size]
    header = [
        "heads", "kind", "million parameters (of the model's)", "million answer tokens", "passes",
        "tested on", "tokens per step, MT-Bench", "interval", "own answers",
    ]  # fmt: skip
    return (
        "**Learning curve**: tokens per step with one tree of 63 nodes against data and size of "
        "the heads; *own answers* are to prompts that were not trained on; Medusa-2's heads "
        "start from the first two rows', and its tokens are those of its own stage; "
        "`benchmarks/results/h100_head_variants.json` and `cpu_compared_heads.json`, both with "
        "the training of `h100_head_variants_medusa_1.json`:\n\n"
        f"![Learning curve]({FIGURE.relative_to(ROOT)})\n\n{table(header, rows)}\n\n"
        f"{_words(by_data, by_size)}"
    )


def _words(by_data: list[Point], by_size: list[Point]) -> str:
    known = {p.name: p for p in by_data}
    curve = [known[name] for name in CURVE]
    bench, own = [(p.tokens, p.mt_bench) for p in curve], [(p.tokens, p.own) for p in curve]
    longest, best = known["sequential"], max(by_data, key=lambda p: p.mt_bench)
    missing = GOAL - longest.mt_bench
    rises = (slope(bench[1:]), slope(bench))
    last, whole = (math.ceil(missing / rise) for rise in rises)
    small, plain, sequential = by_size
    return (
        f"At equal steps ({curve[-1].seen:.1f} million tokens seen, of all data "
        f"{curve[-1].seen / curve[-1].tokens:.1f} passes) a doubling of the data gives sequential "
        f"heads {rises[1]:+.3f} tokens per step on MT-Bench by a line through the three points, "
        f"{slope(bench[:2]):+.3f} up to {bench[1][0]:.1f} million tokens and {rises[0]:+.3f} from "
        f"there; on own answers {slope(own):+.3f}. {longest.seen / curve[-1].seen:.0f} times the "
        f"steps on all data add {longest.mt_bench - curve[-1].mt_bench:+.2f}. From "
        f"{longest.mt_bench:.2f} to {GOAL:.1f} it would be {whole} doublings by the line and "
        f"{last} by its last piece: more answers of this model do not lead there. Size and kind "
        f"do more: three blocks in place of one {plain.mt_bench - small.mt_bench:+.2f}, seeing "
        f"the drafted path {sequential.mt_bench - plain.mt_bench:+.2f}, a base that is trained "
        f"along (Medusa-2) {best.mt_bench - longest.mt_bench:+.2f} for the same sequential heads. "
        f"The best, {best.name}, miss {GOAL:.1f} by {GOAL - best.mt_bench:.2f}, less than the "
        f"interval tells apart ({best.interval[0]:.2f}-{best.interval[1]:.2f})."
    )


def _numbers(by_data: list[Point], by_size: list[Point]) -> str:
    kept = [[p.name, p.parameters, p.tokens, p.mt_bench, p.own] for p in by_data + by_size]
    return json.dumps(kept)


def figure_is_current(folder: Path = RESULTS) -> bool:
    """Whether the figure was drawn from what the records say now."""
    return FIGURE.exists() and _numbers(*read_points(folder)) in FIGURE.read_text()


def draw(folder: Path = RESULTS) -> None:
    """Write the figure; its numbers lie in it as its description."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_data, by_size = read_points(folder)
    known = {p.name: p for p in by_data}
    # Text stays text, and the same numbers make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "medusa"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    curve = [known[name] for name in CURVE]
    xs = [p.tokens for p in curve]
    left.plot(xs, [p.own for p in curve], "s--", color="tab:green", label="own answers")
    left.plot(xs, [p.mt_bench for p in curve], "o-", color="tab:blue", label="MT-Bench")
    joint = [p for p in by_data if p.name.startswith("medusa-2")]
    others = [p for p in by_data if p.name not in CURVE and p not in joint]
    for axes, points, x in (
        (left, others, lambda p: p.tokens), (right, by_size, lambda p: p.share),
        (right, joint, lambda p: p.share),
    ):  # fmt: skip
        for p in points:
            (mark,) = axes.plot(x(p), p.mt_bench, "D" if p in joint else "o", color="k")
            axes.annotate(
                p.name, (x(p), p.mt_bench), xytext=(-6, 6), fontsize=8, ha="right",
                textcoords="offset points",
            )  # fmt: skip
            low, high = p.interval
            axes.plot([x(p)] * 2, [low, high], color=mark.get_color(), linewidth=0.8)
    for axes in (left, right):
        axes.axhline(GOAL, color="tab:red", linewidth=0.8, label=f"goal {GOAL:.1f}")
        axes.grid(alpha=0.3)
    left.set_xscale("log", base=2)
    left.set(xlabel="million answer tokens", ylabel="tokens per step, 63 nodes",
             title="data (lines: sequential heads, equal steps)")  # fmt: skip
    right.set(xlabel="parameters of the heads, % of the model", xlim=(0, 6.5),
              title="size (MT-Bench)")  # fmt: skip
    left.set_xlim(0.5, 32)
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None, "Description": _numbers(by_data, by_size)})
    pyplot.close(figure)
