"""Counters of the kernels by Nsight Compute: what bounds each of them, and what its warps wait for.

    python benchmarks/profile_kernels.py --out record.json [--ncu ncu] [--csv raw.csv]

Runs itself under ncu, which launches every kernel several times, with cold caches and the clocks
as they are; times are those of a kernel alone, without the start of a graph.  FlashAttention 3 on
the largest shapes stands beside.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from records import write_record
from timing import parse_on_gpu

SECTIONS = (
    "LaunchStats", "Occupancy", "SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis",
    "WarpStateStats",
)  # fmt: skip
COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
# Of the record: name -> counter.
FIELDS = {
    "microseconds": "gpu__time_duration.sum",
    "programs": "launch__grid_size",
    "threads": "launch__block_size",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block",
    "waves": "launch__waves_per_multiprocessor",
    "occupancy_percent": "sm__maximum_warps_per_active_cycle_pct",
    "reached_occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_written_bytes": "dram__bytes_write.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_percent": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "multiprocessor_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
}
STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active\.ratio")
TENSOR = re.compile(r"sm__(?:inst_executed_)?pipe_tensor.*pct_of_peak_sustained_active")
LABEL = re.compile(r"case=([^\":;|]+)")
MOST_STALLS = 5
MOST_LETTERS = 80  # of a name; templates are long


def attention_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Tree attention where goals are set, FlashAttention 3 on the same rows as a chain."""
    from attention_calls import ours
    from attention_peers import flash_attention
    from attention_shapes import MODELS, Shape, make_arguments

    for batch, context, rows in ((1, 2048, 40), (1, 2048, 64), (8, 4096, 64), (32, 4096, 64)):
        shape = Shape(batch, context, rows, *MODELS[0])
        arguments = make_arguments(shape)
        yield f"tree attention {shape}", ours(arguments)
        if batch > 1 and find_spec("vllm"):
            yield f"FlashAttention 3 {shape}", flash_attention(arguments)


def step_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """KV move of 32 layers, and what follows the draw, at 1 and 64 requests."""
    import bench_kv_compaction
    import bench_walk

    from vllm_medusa.triton_kernels import KVCompactor

    for batch in (1, 64):
        shape = bench_kv_compaction.Shape(batch, *bench_kv_compaction.MODELS[0], 3)
        caches, arguments = bench_kv_compaction.make_inputs(shape)
        compactor = KVCompactor(caches)
        yield f"KV move {shape}", lambda run=compactor, a=arguments: run(**a)
        shape = bench_walk.Shape(batch, *bench_walk.MODELS[-1])
        step = bench_walk.Step(shape)
        for name, run in bench_walk.kernels(step).items():
            if name not in ("all", "chosen"):
                yield f"{name} {shape}", run


def run_cases() -> None:
    """Every case once between the profiler's start and stop, after a run that compiles."""
    import torch

    for cases in (attention_cases, step_cases):
        for name, run in cases():
            run()
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_push(f"case={' '.join(name.split())}")
            torch.cuda.profiler.start()
            run()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            torch.cuda.nvtx.range_pop()


def command(ncu: str, log: Path) -> list[str]:
    """ncu around this script."""
    words = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--nvtx", "--csv"]
    words += ["--page", "raw", "--print-units", "base", "--log-file", str(log)]
    words += ["--target-processes", "application-only", "--metrics", ",".join(COUNTERS)]
    for section in SECTIONS:
        words += ["--section", section]
    return [*words, sys.executable, __file__, "--cases"]


def number(text: str) -> float | None:
    """A cell of ncu's, or None where it holds none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def read_counters(text: str) -> list[dict[str, Any]]:
    """Kernels of ncu's raw page, in order of their launches.

    Examples
    --------
    >>> page = '"ID","Kernel Name","Ranges","gpu__time_duration.sum"\\n"","","","ns"\\n'
    >>> read_counters('==PROF== x\\n' + page + '"0","k","case=a b:1","1,500"\\n')
    [{'case': 'a b', 'kernel': 'k', 'microseconds': 1.5}]
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise ValueError(f"found no table in ncu's output: {text[-2000:]}")
    table = list(csv.reader(line for line in lines[first:] if line.startswith('"')))
    return [_kernel(dict(zip(table[0], row, strict=False)), row) for row in table[2:]]


def _kernel(cells: dict[str, str], row: list[str]) -> dict[str, Any]:
    labels = [found[1].strip() for cell in row if (found := LABEL.search(cell))]
    values = {name: number(cell) for name, cell in cells.items()}
    found: dict[str, Any] = {
        "case": labels[0] if labels else None, "kernel": cells["Kernel Name"][:MOST_LETTERS]
    }  # fmt: skip
    found |= {field: values[name] for field, name in FIELDS.items() if values.get(name) is not None}
    if "microseconds" in found:
        found["microseconds"] /= 1e3  # the base unit is a nanosecond
    tensor = [value for name, value in values.items() if TENSOR.search(name) and value is not None]
    if tensor:
        found["tensor_percent"] = max(tensor)
    # Cycles that a warp waits between two instructions, by reason.
    stalls = {
        match[1]: round(values[name], 2)
        for name in values
        if (match := STALL.search(name)) and values[name]
    }
    if stalls:
        longest = sorted(stalls, key=stalls.__getitem__, reverse=True)[:MOST_STALLS]
        found["waits"] = {name: stalls[name] for name in longest}
    return found


def main() -> None:
    """Profile, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON record to write")
    parser.add_argument("--ncu", default="ncu", help="program to run")
    parser.add_argument("--csv", type=Path, help="keep ncu's whole table here")
    parser.add_argument("--cases", action="store_true", help="only run the kernels")
    args = parse_on_gpu(parser)
    if args.cases:
        run_cases()
        return
    if args.out is None:
        parser.error("give --out")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.csv")
        done = subprocess.run(command(args.ncu, log), capture_output=True, text=True)
        text = log.read_text() if log.exists() else ""
    if args.csv is not None:
        args.csv.write_text(text)
    if done.returncode:
        sys.exit(f"ncu ended with {done.returncode}: {text[-1500:]}\n{done.stderr[-1500:]}")
    kernels = read_counters(text)
    for kernel in kernels:
        shown = {name: kernel.get(name) for name in ("microseconds", "registers", "waits")}
        shown |= {name: kernel[name] for name in kernel if name.endswith("percent")}
        print(kernel["case"], kernel["kernel"][:40], shown)
    write_record(args.out, {"benchmark": "kernel_counters", "kernels": kernels})


if __name__ == "__main__":
    main()
