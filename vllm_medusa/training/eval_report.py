"""Tables and plots of an evaluation record."""

from pathlib import Path
from typing import Any

_DASH = "-"


def print_evaluation(record: dict[str, Any]) -> None:
    """Print the record's tables."""
    from rich.console import Console

    console = Console()
    for table in (_groups_table(record), _prediction_table(record), _rank_table(record)):
        console.print(table)


def _percent(value: float | None) -> str:
    return _DASH if value is None else f"{100 * value:.1f}"


def _groups_table(record: dict[str, Any]) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    served = record["served"]
    depth = len(served["all"]["accepted_by_depth"])
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title=(
        f"Served, {record['tree']['nodes']} nodes: tokens per step with their interval, range over "
        "prompts, share of steps accepting depth d"
    ))  # fmt: skip
    for name in ("category", "steps", "tok/step", "95 %", "range"):
        table.add_column(name, justify="left" if name == "category" else "right")
    for d in range(1, depth + 1):
        table.add_column(f"d{d} %", justify="right")
    groups = [*served["categories"].items(), ("all", served["all"])]
    for name, group in groups if len(groups) > 2 else groups[-1:]:
        spread = group["spread_over_prompts"]
        low, high = group["interval"]
        table.add_row(
            name, str(group["steps"]), f"{group['tokens_per_step']:.3f}",
            f"{low:.2f}..{high:.2f}",
            f"{spread['min']:.2f}..{spread['max']:.2f}" if spread else _DASH,
            *(_percent(rate) for rate in group["accepted_by_depth"]),
        )  # fmt: skip
    return table


def _prediction_table(record: dict[str, Any]) -> Any:
    from rich.table import Table

    served = record["served"]["all"]["tokens_per_step"]
    table = Table("tokens per step", "value", "served is", title="Predicted and served")
    predicted, simulated = record["predicted"], record["simulated"]
    rows = (
        ("served", served),
        ("simulated on the same answers", simulated["tokens_per_step"]),
        ("tree.json, simulated on its answers", predicted["from_calibration_answers"]),
        ("tree.json, products of head accuracies", predicted["from_calibrated_accuracies"]),
        ("products of accuracies on these answers", predicted["from_accuracies_on_these_answers"]),
    )
    for name, value in rows:
        off = f"{100 * (served / value - 1):+.1f} %" if value else _DASH
        table.add_row(name, _DASH if value is None else f"{value:.3f}", off)
    return table


def _rank_table(record: dict[str, Any]) -> Any:
    from rich.table import Table

    simulated = record["simulated"]
    accepted = simulated["accepted_by_head_and_rank"]
    ranks = len(accepted[0])
    shown = min(ranks, 6)
    table = Table(title="Right token by head and rank, % (accepted, % of steps)")
    table.add_column("head")
    for rank in range(shown):
        table.add_column(f"rank {rank + 1}", justify="right")
    for head, row in enumerate(simulated["head_accuracies"]):
        cells = [f"{_percent(row[i])} ({_percent(accepted[head][i])})" for i in range(shown)]
        table.add_row(str(head + 1), *cells)
    return table


def save_plots(record: dict[str, Any], directory: str | Path) -> list[Path]:
    """Write ``acceptance.png`` (by depth) and ``tree.png`` (the tree with its shares)."""
    import matplotlib

    matplotlib.use("Agg")
    directory = Path(directory)
    return [_plot_depths(record, directory), _plot_tree(record, directory)]


def _plot_depths(record: dict[str, Any], directory: Path) -> Path:
    from matplotlib import pyplot

    series = {
        "served": record["served"]["all"]["accepted_by_depth"],
        "simulated on the same answers": record["simulated"]["accepted_by_depth"],
        "calibrated": record["predicted"]["by_depth_from_calibration_answers"],
    }
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for (name, values), style in zip(series.items(), ("o-", "s--", "^:"), strict=True):
        if values:
            axes.plot(range(1, len(values) + 1), values, style, label=name)
    axes.set(xlabel="depth", ylabel="share of steps that reach it", ylim=(0, 1))
    axes.set_xticks(range(1, len(series["served"]) + 1))
    axes.legend()
    axes.set_title(f"{record['served']['all']['tokens_per_step']:.2f} tokens per step")
    return _save(figure, directory / "acceptance.png")


def tree_layout(paths: list[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[float, int]]:
    """(x, depth) of every node and the root: leaves side by side, parents over their children.

    >>> tree_layout([(0,), (1,), (0, 0), (0, 1)])[()]
    (1.25, 0)
    """
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for path in sorted(paths):
        children.setdefault(path[:-1], []).append(path)
    places: dict[tuple[int, ...], tuple[float, int]] = {}
    next_leaf = 0

    def place(path: tuple[int, ...]) -> float:
        nonlocal next_leaf
        below = [place(child) for child in children.get(path, ())]
        if below:
            x = (below[0] + below[-1]) / 2
        else:
            x = float(next_leaf)
            next_leaf += 1
        places[path] = (x, len(path))
        return x

    place(())
    return places


def _plot_tree(record: dict[str, Any], directory: Path) -> Path:
    from matplotlib import pyplot

    shares = {tuple(node["path"]): node["share"] for node in record["simulated"]["accepted_nodes"]}
    places = tree_layout(list(shares))
    leaves = 1 + max(x for x, _ in places.values())
    size = (max(6, 0.42 * leaves), 1.6 + 1.3 * max(map(len, shares)))
    figure, axes = pyplot.subplots(figsize=size)
    shades = pyplot.get_cmap("viridis")
    for path, share in shares.items():
        (x, depth), (parent_x, parent_depth) = places[path], places[path[:-1]]
        axes.plot([parent_x, x], [-parent_depth, -depth], color="0.6", lw=0.5 + 6 * share, zorder=1)
    xs, depths = zip(*(places[path] for path in shares), strict=True)
    points = axes.scatter(
        xs, [-d for d in depths], c=[shares[p] for p in shares], cmap=shades, s=90, zorder=2,
        vmin=0, vmax=max(shares.values()) or 1,
    )  # fmt: skip
    axes.scatter([places[()][0]], [0], c="black", s=110, zorder=2)
    for path, share in shares.items():
        x, depth = places[path]
        label = f"{path[-1] + 1}\n{100 * share:.1f}"
        axes.annotate(label, (x, -depth), (0, -8), textcoords="offset points", fontsize=6,
                      ha="center", va="top")  # fmt: skip
    axes.set_axis_off()
    axes.set_title("Share of steps that accept each node (rank, %)")
    figure.colorbar(points, ax=axes, shrink=0.6)
    return _save(figure, directory / "tree.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
