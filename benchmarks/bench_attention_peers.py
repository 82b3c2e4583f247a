"""Tree attention beside its peers over batch sizes, contexts and rows: who is faster where.

    python benchmarks/bench_attention_peers.py --out record.json [--seconds 145] [--processes 12]

The kernels of bench_tree_attention.py in the same way (cold L2, CUDA graph replay, in turns,
outputs compared first), without the chain mask.  Before the first is timed, a pool of processes
runs the smaller shapes once: they share Triton's cache on disk.  Shapes come in random order and
end when --seconds are over; which are left out is recorded.  A shape that a peer refuses, or a
peer that cannot be captured and is timed launch by launch, is recorded with the reason.
"""

from __future__ import annotations

import random
import time

import torch
from attention_shapes import BLOCK_SIZE, MODELS, Shape, make_arguments, work_of
from bench_tree_attention import (
    bench_shape,
    device_rates,
    left_out,
    present,
    print_failures,
    print_header,
    print_row,
)
from records import write_record
from timing import compile_in_pool, parse_on_gpu, reason_of, sweep_parser

SHAPES = [
    Shape(batch, context, rows, *model)
    for model, batches, contexts, rows_of_a_request in (
        (MODELS[0], (1, 4, 16, 64), (128, 512, 2048, 8192, 32768), (8, 16, 32, 64)),
        (MODELS[1], (1, 8, 64), (128, 2048, 8192), (8, 64)),
        (MODELS[2], (1, 8, 64), (128, 2048, 32768), (8, 64)),
    )
    for batch in batches
    for context in contexts
    for rows in rows_of_a_request
]
# Of keys and values: a dozen processes that each run one such shape fit beside each other.
MOST_BYTES_TO_COMPILE = 512 << 20


def kernels() -> dict:
    """All but the chain mask, which costs what the tree's does."""
    return {name: make for name, make in present().items() if name != "tree-causal"}


def compile_shape(shape: Shape) -> None:
    """Run every kernel once; what fails here fails again where it is recorded."""
    arguments = make_arguments(shape)
    for make in kernels().values():
        try:
            make(arguments)()
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"{shape}: {problem}"[:120], flush=True)
    torch.cuda.empty_cache()


def compile_all(processes: int) -> None:
    """Fill Triton's cache."""
    small = [shape for shape in SHAPES if work_of(shape)[0] <= MOST_BYTES_TO_COMPILE]
    compile_in_pool(compile_shape, small, processes)


def main() -> None:
    """Compile, measure, write the record."""
    begin = time.monotonic()
    args = parse_on_gpu(sweep_parser(__doc__, seconds=145, processes=12))
    compile_all(args.processes)
    print(f"{time.monotonic() - begin:.0f} s: compiled", flush=True)
    makes, rates = kernels(), device_rates()
    rows, problems = {}, {}
    print_header(makes)
    for shape in random.Random(0).sample(SHAPES, len(SHAPES)):
        if time.monotonic() - begin >= args.seconds:
            problems[shape] = "no time was left"
            continue
        try:
            rows[shape] = bench_shape(shape, makes, rates, args.repeats)
            print_row(shape, rows[shape])
        except RuntimeError as problem:  # too little memory, or a peer broke the device's context
            problems[shape] = reason_of(problem)
            print(f"{shape}: {problems[shape]}", flush=True)
    rows = {shape: rows[shape] for shape in SHAPES if shape in rows}
    print_failures(list(rows.values()))
    print(f"{time.monotonic() - begin:.0f} s: {len(rows)} of {len(SHAPES)} shapes")
    write_record(
        args.out,
        {
            "benchmark": "tree_attention_peers",
            "block_size": BLOCK_SIZE,
            "left_out": left_out(),
            "not_measured": [
                {"shape": shape._asdict(), "reason": reason} for shape, reason in problems.items()
            ],
            "rates": rates,
            "rows": list(rows.values()),
        },
    )


if __name__ == "__main__":
    main()
