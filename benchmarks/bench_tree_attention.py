"""Tree attention beside vLLM's Triton attention, FlashAttention 3, FlashInfer and xformers.

    python benchmarks/bench_tree_attention.py --out record.json [--quick]

All kernels read the same paged bfloat16 cache.  "fa3+tree" is the two-part route.  The Triton
peer gets the tree as its ``qq_bias`` (one mask for the whole batch); FlashAttention cannot take
one and runs the same rows causally, as a chain, which is the cost of verification without a
tree.  FlashInfer gets a custom mask, xformers (in pages of 64) runs its own tree attention; both
are left out, with the reason, where they are not installed; bench_attention_peers.py measures
all of them over all shapes.  Every output is compared with the PyTorch twin in float32 before it
is timed, all kernels of a shape in turns.  A peer that fails is reported in its column.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import attention_peers
import torch
from attention_calls import chosen_plan, ours, ours_causal, two_parts, with_plan
from attention_figures import measured_rates, reached, resources
from attention_shapes import (
    BLOCK_SIZE,
    MODELS,
    TOLERANCE,
    Shape,
    chain_masks,
    floor_us,
    make_arguments,
    twin_output,
    work_of,
)
from records import write_record
from timing import (
    capture,
    kernel_benchmark_parser,
    parse_on_gpu,
    reason_of,
    start_us,
    time_in_turns,
)

from vllm_medusa.triton_kernels.attention_plan import ceil_div, workspace_elements

ALL_SHAPES = [
    Shape(batch, context, rows, *model)
    for model in MODELS
    for rows in (8, 16, 40, 64, 128)
    for batch in (1, 4, 8, 16, 32, 64)
    for context in (128, 512, 2048, 8192, 32768)
    # 16 GB of keys and values
    if batch * context * model[1] <= 1 << 24
]
# Batch sizes with the rows that the default node budget gives them, and the corners.
QUICK_SHAPES = [
    Shape(batch, context, rows, *model)
    for model, cells in {
        MODELS[0]: [(1, 512, 64), (1, 2048, 40), (1, 2048, 64), (1, 2048, 128), (1, 8192, 64),
                    (4, 2048, 64), (8, 1024, 32), (16, 1024, 16), (8, 4096, 64), (32, 4096, 64)],
        MODELS[1]: [(1, 2048, 64), (8, 4096, 64), (32, 4096, 64)],
        MODELS[2]: [(1, 512, 64), (8, 512, 32)],
    }.items()
    for batch, context, rows in cells
]  # fmt: skip
QUICK_SECONDS = 110  # after which --quick leaves the rest out

KERNELS: dict[str, Callable] = {
    "tree": ours, "tree-causal": ours_causal, "fa3+tree": two_parts,
    "triton-qq-bias": attention_peers.vllm_triton,
    "fa3-causal": attention_peers.flash_attention,
}  # fmt: skip
PEERS: dict[str, Callable] = {
    "flashinfer": attention_peers.flashinfer, "xformers": attention_peers.xformers,
}  # fmt: skip


def left_out() -> dict[str, str]:
    """Peers that are not there, with the reason."""
    reasons = {name: attention_peers.missing(name) for name in PEERS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def present() -> dict[str, Callable]:
    """What is measured here."""
    return KERNELS | {name: make for name, make in PEERS.items() if name not in left_out()}


class Prepared(NamedTuple):
    """One kernel on one shape.

    Attributes
    ----------
    entry : dict
        Error of its output, or the reason why there is none.
    run : callable or None
        Replays its graph, or launches it where it cannot be captured.
    kept : callable or None
        Holds the tensors that the graph reads.
    """

    entry: dict[str, Any]
    run: Callable[[], object] | None = None
    kept: Callable[[], object] | None = None


def prepare(make: Callable, arguments: dict[str, Any], want: torch.Tensor) -> Prepared:
    """Compare a kernel's output and capture it."""
    try:
        run = make(arguments)
        arguments["out"].fill_(float("nan"))
        run()
        error = (arguments["out"].float() - want).abs().max().item()
    except Exception as problem:
        torch.cuda.synchronize()
        return Prepared({"failed": reason_of(problem)})
    entry = {"max_error": error, "correct": error <= TOLERANCE}
    try:
        return Prepared(entry, capture(run).replay, run)
    except Exception as problem:
        torch.cuda.synchronize()
        return Prepared(entry | {"uncaptured": reason_of(problem)}, run, run)


def measure(
    makes: dict[str, Callable], arguments: dict[str, Any], repeats: int
) -> dict[str, dict[str, Any]]:
    """Errors and times of kernels, which take turns."""
    num_reqs, chain = arguments["num_reqs"], chain_masks(arguments["max_query_len"])
    wants = {
        False: twin_output(arguments, arguments["tree_masks"]),
        True: twin_output(arguments, chain.expand(num_reqs, *chain.shape)),
    }
    prepared = {
        name: prepare(make, arguments, wants["causal" in name]) for name, make in makes.items()
    }
    timed = [kernel for kernel in prepared.values() if kernel.run is not None]
    for kernel, timing in zip(
        timed, time_in_turns([kernel.run for kernel in timed], repeats=repeats), strict=True
    ):
        kernel.entry.update(timing.as_dict())
    return {name: kernel.entry for name, kernel in prepared.items()}


def figures(
    shape: Shape, arguments: dict[str, Any], median_us: float, rates: dict[str, float]
) -> dict[str, Any]:
    """Plan, resources and rates of this kernel."""
    plan = chosen_plan(shape)
    pairs = shape.batch * shape.kv_heads
    programs = [
        plan.row_tiles * pairs * plan.num_splits,
        ceil_div(shape.rows * shape.heads // shape.kv_heads, plan.join_rows or 1) * pairs,
    ]
    compiled = [again() for again in with_plan(plan, arguments)()]
    kv_bytes, flop = work_of(shape)
    elements = workspace_elements(
        shape.batch * shape.rows, shape.heads, shape.head_size, plan.num_splits
    )
    moved = kv_bytes + 2 * arguments["q"].nbytes
    return {
        "plan": dataclasses.asdict(plan),
        "workspace_bytes": 4 * elements,
        "kernels": [resources(*one) for one in zip(compiled, programs, strict=False)],
        **reached(median_us, rates["start_us"], moved, flop, rates),
    }


def device_rates() -> dict[str, float]:
    """Of a copy and a product, and microseconds of a graph that does nothing."""
    return measured_rates() | {"start_us": start_us()}


def bench_shape(
    shape: Shape, makes: dict[str, Callable], rates: dict[str, float], repeats: int
) -> dict[str, Any]:
    """Kernels on one shape."""
    arguments = make_arguments(shape)
    kernels = measure(makes, arguments, repeats)
    median = kernels["tree"].get("median")
    found = {} if median is None else {"figures": figures(shape, arguments, median, rates)}
    row = {"shape": shape._asdict(), "floor_us": round(floor_us(shape), 2), "kernels": kernels}
    return row | found


def print_header(names: Iterable[str]) -> None:
    """What `print_row` prints below."""
    print(f"{'microseconds, median ± (p90 - p10), ! = wrong':<38} {'floor':>8} "
          + " ".join(f"{name:>16}" for name in names), flush=True)  # fmt: skip


def print_row(shape: Shape, row: dict[str, Any]) -> None:
    """One shape."""
    cells = []
    for result in row["kernels"].values():
        if "failed" in result:
            cells.append(f"{'failed':>16}")
        else:
            mark = " " if result["correct"] else "!"
            cells.append(f"{result['median']:9.1f} ±{result['p90'] - result['p10']:5.1f}{mark}")
    print(f"{shape} {row['floor_us']:8.1f} {' '.join(cells)}", flush=True)


def print_failures(rows: list[dict[str, Any]]) -> None:
    """Every reason why a kernel was not timed, or not from a graph, once."""
    entries = [(name, entry) for row in rows for name, entry in row["kernels"].items()]
    for what in ("failed", "uncaptured"):
        for name, reason in sorted({(name, e[what]) for name, e in entries if what in e}):
            print(f"{name} {what}: {reason}")


def main() -> None:
    parser = kernel_benchmark_parser(__doc__, "a few shapes, about two minutes")
    args = parse_on_gpu(parser)
    for name, reason in left_out().items():
        print(f"{name} left out: {reason}")
    rates, makes = device_rates(), present()
    print_header(makes)
    deadline, rows = math.inf, []
    for shape in QUICK_SHAPES if args.quick else ALL_SHAPES:
        if time.monotonic() > deadline:
            print(f"{shape} and what follows left out: {QUICK_SECONDS} s are over")
            break
        rows.append(bench_shape(shape, makes, rates, args.repeats))
        print_row(shape, rows[-1])
        if args.quick and len(rows) == 1:  # which has compiled everything
            deadline = time.monotonic() + QUICK_SECONDS
    print_failures(rows)
    write_record(
        args.out,
        {
            "benchmark": "tree_attention",
            "block_size": BLOCK_SIZE,
            "left_out": left_out(),
            "rates": rates,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
