"""What trees cost on a cluster, on paper: the tables of docs/clusters.md.

    python benchmarks/cluster_numbers.py            # print them
    python benchmarks/cluster_numbers.py --write    # put them into the page

Bytes follow from shapes; times divide them by the rates below and add nothing for latency.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"
RECORD = Path(__file__).parent / "results" / "two_gpus_cluster.json"
BF16 = 2
KEY = 8  # a candidate's value and id
NUM_HEADS, NUM_TOP = 5, 10
ROWS = (1, 16, 32, 64)  # root and nodes
# Bytes/s that a decode step reads weights with on an H100, and links per GPU and direction.
MEMORY = 3.0e12
LINKS = {
    "NVLink 4": 450e9,
    "PCIe 5 x16": 55e9,
    "400 Gbit/s network": 50e9,
    "100 Gbit/s network": 12.5e9,
}


@dataclass(frozen=True)
class Model:
    """A dense Llama's sizes."""

    name: str
    parameters: float
    hidden: int
    layers: int


MODELS = (Model("8B", 8.0e9, 4096, 32), Model("70B", 70.6e9, 8192, 80),
          Model("405B", 405.9e9, 16384, 126))  # fmt: skip
VOCABULARIES = {"128k": 128_256, "256k": 256_000}


def all_reduce_bytes(model: Model, rows: int) -> int:
    """What a tensor-parallel rank hands to all-reduce in a step: two sums a layer."""
    return 2 * model.layers * model.hidden * BF16 * rows


def logits_bytes(vocabulary: int, rows: int, ranks: int) -> int:
    """A rank's part of the logits that sampling gathers."""
    return rows * vocabulary * BF16 // ranks


def draft_bytes(model: Model, ranks: int) -> int:
    """What a rank sends to draft one tree: its columns of the heads' states, its best tokens."""
    return NUM_HEADS * model.hidden * BF16 // ranks + NUM_HEADS * NUM_TOP * KEY


def stage_bytes(model: Model, rows: int) -> int:
    """What one pipeline stage sends to the next: hidden states and residuals."""
    return 2 * model.hidden * BF16 * rows


def path_bytes(rows: int) -> int:
    """What the last stage sends back: tokens with the path mask, two counts, drafts."""
    return 8 * rows + 8 + 8 * (rows - 1)


def head_bytes(model: Model, scored: int, ranks: int) -> int:
    """Heads of one layer on one GPU; ``scored``: rows of all their lm_heads, 0 for a shared one."""
    return (NUM_HEADS * model.hidden**2 + scored * model.hidden) * BF16 // ranks


def row_seconds(model: Model, ranks: int, link: float) -> float:
    """All-reduce of one more row: a ring sends 2 (T - 1) / T of it over each link."""
    return all_reduce_bytes(model, 1) * 2 * (ranks - 1) / ranks / link


def most_rows(model: Model, ranks: int, link: float, share: float = 0.2) -> int:
    """Rows of a step whose all-reduce takes ``share`` of the time that reading weights takes."""
    return int(share * model.parameters * BF16 / ranks / MEMORY / row_seconds(model, ranks, link))


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of ten.

    Examples
    --------
    >>> size(512), size(1_310_720), size(2.62e9)
    ('512 B', '1.3 MB', '2.6 GB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def traffic_table() -> str:
    """Bytes per step and request."""
    rows = [
        [model.name, str(count), size(all_reduce_bytes(model, count)),
         size(logits_bytes(128_256, count, 8)), size(draft_bytes(model, 8)),
         size(stage_bytes(model, count)), size(path_bytes(count))]
        for model in MODELS for count in ROWS
    ]  # fmt: skip
    head = ["model", "rows of a request", "all-reduce, a rank", "logits, a rank of 8",
            "draft, a rank of 8", "stage to stage", "last stage to the others"]  # fmt: skip
    return table(head, rows)


def memory_table() -> str:
    """Bytes of five heads per GPU."""
    rows = []
    for model in MODELS[1:]:
        for name, vocabulary in VOCABULARIES.items():
            kinds = {
                "shared lm_head": 0,
                "a draft vocabulary of 32,768 ids": 32_768,
                "own lm_heads": NUM_HEADS * vocabulary,
            }
            for kind, scored in kinds.items():
                cells = [size(head_bytes(model, scored, ranks)) for ranks in (1, 2, 8, 16)]
                rows.append([model.name, name, kind, *cells])
    return table(["model", "vocabulary", "heads", *(f"T = {t}" for t in (1, 2, 8, 16))], rows)


def budget_table() -> str:
    """Rows at which all-reduce has grown to a fifth of reading the weights."""
    rows = [
        [model.name, str(ranks), *(str(most_rows(model, ranks, link)) for link in LINKS.values())]
        for model in MODELS for ranks in (2, 8, 16)
    ]  # fmt: skip
    return table(["model", "T", *LINKS], rows)


def record_table(path: Path = RECORD) -> str:
    """What ``bench_cluster.py`` measured, if it was run."""
    if not path.exists():
        return "Not measured yet: `benchmarks/bench_cluster.py` needs a host with two GPUs."
    record = json.loads(path.read_text())
    rows = []
    for entry in record["engines"]:
        compared = record["comparison"].get(entry["parallel"], {})
        for result in entry["results"]:
            level = str(result["concurrency"])
            medusa = entry["side"] == "medusa"
            speedup = compared.get("speedup", {}).get(level) if medusa else None
            same = compared.get(f"{entry['side']}_equals_one_gpu", {}).get(level)
            shared = result.get("collectives")
            rows.append([
                entry["parallel"], entry["side"], level,
                f"{result['tokens_per_s']['median']:.1f}", f"{result['step_ms']['median']:.2f}",
                f"{speedup:.2f}" if speedup else "", f"{same['equal']} of {same['of']}" if same
                else "", f"{shared['share']:.0%}" if shared else "",
                ", ".join(map(size, entry["head_bytes_by_rank"] or [])),
            ])  # fmt: skip
    head = ["GPUs", "side", "requests", "tok/s", "step ms", "speed-up", "as one GPU", "collectives",
            "heads by rank"]  # fmt: skip
    settings = record["settings"]
    # Records from before there was a choice of load name none.
    load = record.get("load", "finite batch")
    title = f"{settings['model']}, {settings['dtype']}, executor {settings['executor']}, {load}"
    device = " + ".join(record["provenance"]["gpus"])
    return f"{title}; {device}; `benchmarks/results/{path.name}`:\n\n{table(head, rows)}"


TABLES = {
    "traffic": traffic_table,
    "memory": memory_table,
    "budget": budget_table,
    "record": record_table,
}


def fill(page: str) -> str:
    """The page with its tables made anew, each between its two comments."""
    for name, make in TABLES.items():
        begin, end = f"<!-- numbers {name} -->\n", f"<!-- /numbers {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        page, count = re.subn(pattern, begin + make() + "\n" + end, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}, expected 1")
    return page


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(fill(PAGE.read_text()))
    else:
        print("\n\n".join(make() for make in TABLES.values()))


if __name__ == "__main__":
    main()
