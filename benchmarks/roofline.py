"""A decode step against what the machine allows, for every tree width and batch.

    python benchmarks/roofline.py --model MODEL --heads HEADS --out record.json [--plot FILE.svg]
    python benchmarks/roofline.py --from record.json --plot FILE.svg

The floor of a step is the larger of its bytes (weights, heads, the requests' KV cache) over the
memory's bandwidth and its products over the peak rate, both of them arguments (an H100 copies
about 3.0 TB/s and reaches about 800 TFLOP/s).  Needs matplotlib for the plot only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from engine_process import EngineProcess, benchmarks_on_path
from records import write_record
from roofline_figure import draw_roofline
from timing import BANDWIDTH, PRODUCT_RATE

TFLOPS = PRODUCT_RATE / 1e12


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="target model directory")
    parser.add_argument("--heads", help="Medusa heads with a calibrated tree")
    parser.add_argument("--label", default=None, help="how tables name the model")
    parser.add_argument("--out", type=Path, help="JSON record to write")
    parser.add_argument("--from", dest="record", type=Path, help="plot this record")
    parser.add_argument("--plot", type=Path, default=None, help="picture to write")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="peak of large bf16 products")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH / 1e12, help="of memory, TB/s")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=8448)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--kv-cache-gb", type=float, default=None)
    parser.add_argument("--enforce-eager", action="store_true", help="start fast, run slowly")
    parser.add_argument("--config", type=json.loads, default={}, help="more of speculative_config")
    args = parser.parse_args()
    if args.record is None and None in (args.model, args.heads, args.out):
        parser.error("give --model, --heads and --out, or --from")
    return args


def step_work(sizes: dict[str, Any], rows: int, requests: int, context: int) -> tuple[float, float]:
    """Bytes that a step must move and operations that it must do.

    Examples
    --------
    >>> sizes = {"weight_bytes": 20, "product_weights": 10, "draft_bytes": 5,
    ...          "cache_bytes_per_token": 2, "flops_per_row_and_key": 4}
    >>> step_work(sizes, rows=1, requests=1, context=7), step_work(sizes, 2, 3, 7)
    ((36.0, 52.0), (79.0, 336.0))
    """
    keys = context + rows
    moved = sizes["weight_bytes"] + requests * keys * sizes["cache_bytes_per_token"]
    if rows > 1:
        moved += sizes["draft_bytes"]
    each = 2 * sizes["product_weights"] + keys * sizes["flops_per_row_and_key"]
    return float(moved), float(rows * requests * each)


def points(sizes: dict[str, Any], bandwidth: float, tflops: float) -> list[dict[str, Any]]:
    """Measured and least milliseconds of every step that was timed."""
    found = []
    for rows, requests, context, seconds in sizes["steps"]:
        moved, operations = step_work(sizes, rows, requests, context)
        reading, computing = moved / (bandwidth * 1e12), operations / (tflops * 1e12)
        found.append(
            {
                "nodes": rows - 1, "requests": requests, "context": context,
                "ms": 1e3 * seconds, "floor_ms": 1e3 * max(reading, computing),
                "bound": "bytes" if reading >= computing else "products",
                "flops_per_byte": operations / moved, "tflops": operations / seconds / 1e12,
            }
        )  # fmt: skip
    return found


def step_record(
    sizes: dict[str, Any],
    args: argparse.Namespace,
    bandwidth: float = BANDWIDTH / 1e12,
    tflops: float = TFLOPS,
) -> dict[str, Any]:
    """The record of what ``StepMeter.measure_model`` tells; ``args`` name model and heads."""
    name = Path(args.model).name
    return {
        "benchmark": "roofline", "model": name, "heads": Path(args.heads).name,
        "label": args.label or name, "bandwidth": bandwidth, "tflops": tflops,
        "sizes": {k: v for k, v in sizes.items() if k != "steps"},
        "points": points(sizes, bandwidth, tflops),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, time its steps, write the record."""
    arguments: dict[str, Any] = {
        "model": args.model, "dtype": args.dtype, "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs, "enforce_eager": args.enforce_eager,
        "worker_extension_cls": "step_meter.StepMeter",
        "speculative_config": {"method": "medusa", "model": args.heads} | args.config,
    }  # fmt: skip
    if args.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(args.kv_cache_gb * 2**30)
    engine = EngineProcess("steps", arguments, benchmarks_on_path())
    try:
        engine.wait_ready()
        sizes = engine.call_workers("measure_model")[0]
    finally:
        engine.close()
    write_record(args.out, step_record(sizes, args, args.bandwidth, args.tflops))
    return json.loads(args.out.read_text())


def main() -> None:
    """Measure or read, print, plot."""
    args = parse_args()
    record = measure(args) if args.record is None else json.loads(args.record.read_text())
    for point in record["points"]:
        print(
            f"{point['nodes']:>3} nodes, {point['requests']:>3} at once, context "
            f"{point['context']:>5}: {point['ms']:8.3f} ms, floor {point['floor_ms']:8.3f} "
            f"({point['bound']}), {point['floor_ms'] / point['ms']:.0%}"
        )
    if args.plot is not None:
        draw_roofline(record, args.plot)


if __name__ == "__main__":
    main()
