"""Products with float8 weights at the shapes of an 8B model's heads, beside their peers.

    python benchmarks/bench_float8_product.py --out record.json [--seconds 90] [--quick]
    python benchmarks/bench_float8_product.py --out plans.json --sweep [--dtype float16]

`torch` multiplies the same weights as they were, unquantised, by cuBLAS; `marlin` is vLLM's
product with float8 weights alone, `scaled_mm` its product with both sides in float8, which first
rounds each row of the inputs.  A peer that knows no groups is launched once for each.  Outputs are
compared with the twin first; a peer's error is recorded.  Every round replays one CUDA graph of
each, L2 cold.  ``--sweep`` times launch plans instead, which a pool of processes compiles first.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from records import write_record
from timing import (
    capture,
    compile_in_pool,
    parse_on_gpu,
    reason_of,
    start_us,
    sweep_parser,
    time_gpu,
    time_in_turns,
)
from torch.nn import functional

from vllm_medusa.draft_weights import to_float8_rows
from vllm_medusa.kernels import float8_product
from vllm_medusa.triton_kernels import reference
from vllm_medusa.triton_kernels.float8 import Plan, plan_for

DEVIATION = 0.02
# Groups, outputs, columns: independent heads' layers and lm_heads, sequential heads' first layers.
WEIGHTS = (
    (1, 16384, 4096), (4, 4096, 4096), (1, 32064, 4096), (1, 16032, 4096),
    (1, 4096, 8192), (1, 4096, 12288), (1, 4096, 16384), (1, 4096, 20480),
)  # fmt: skip
ROWS = (1, 8, 31, 64, 256)
QUICK_ROWS = (1, 31)
# Of the output's largest number: both sides in bfloat16 are rounded once more, to 8 bits.
TOLERANCE = 0.01
# Shared memory of a block; the rest of an H100's 227 KiB is for what the compiler adds.
MOST_SHARED = 200 << 10
# Plans shown for each shape.
SHOWN = 5


class Arguments(NamedTuple):
    """Of a product, and the weight before it was rounded."""

    out: torch.Tensor  # [G, n, O]
    inputs: torch.Tensor  # [1 or G, n, I]
    weight: torch.Tensor  # [G, O, I] float8
    scale: torch.Tensor  # [G, O]
    exact: torch.Tensor  # [G, O, I]

    def run(self, plan: Plan | None = None) -> None:
        """Our product."""
        float8_product(self.out, self.inputs, self.weight, self.scale, plan=plan)

    def twin(self) -> torch.Tensor:
        """What it should be, [G, n, O]."""
        want = torch.empty_like(self.out)
        reference.float8_product(want, self.inputs, self.weight, self.scale)
        return want


def deviation(found: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, in shares of the largest number; NaN where one is missing."""
    return ((found.float() - want.float()).abs().max() / want.float().abs().max()).item()


def make_weight(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random weight: rounded, its scale, exact."""
    torch.manual_seed(0)
    exact = torch.randn(shape, dtype=dtype, device="cuda") * DEVIATION
    return *to_float8_rows(exact), exact


def make_arguments(weights: tuple[torch.Tensor, ...], rows: int) -> Arguments:
    """Random inputs for a weight: a row for every group's, as the second layer has."""
    groups, outputs, size = weights[0].shape
    inputs = torch.randn(rows, groups, size, dtype=weights[2].dtype, device="cuda")
    out = inputs.new_empty(rows, groups, outputs)
    return Arguments(out.transpose(0, 1), inputs.transpose(0, 1), *weights)


def torch_product(arguments: Arguments) -> Callable[[], torch.Tensor]:
    """What the heads do without float8."""
    inputs, exact = arguments.inputs, arguments.exact
    if len(exact) == 1:
        return lambda: functional.linear(inputs[0], exact[0])[None]
    return lambda: torch.bmm(inputs, exact.transpose(1, 2))


def marlin(arguments: Arguments) -> Callable[[], list[torch.Tensor]]:
    """vLLM's weight-only kernel, with weights in its order."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_make_workspace_new,
    )
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp8 import (
        apply_fp8_marlin_linear,
        prepare_fp8_layer_for_marlin,
    )

    outputs, size = arguments.weight.shape[1:]
    workspace, layers = marlin_make_workspace_new(arguments.weight.device), []
    for weight, scale in zip(arguments.weight, arguments.scale, strict=True):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        layer.output_size_per_partition, layer.input_size_per_partition = outputs, size
        layer.orig_dtype = arguments.inputs.dtype
        prepare_fp8_layer_for_marlin(layer, size_k_first=False)
        layers.append(layer)
    rows = [inputs.contiguous() for inputs in arguments.inputs]
    return lambda: [
        apply_fp8_marlin_linear(
            inputs, layer.weight, layer.weight_scale, workspace, outputs, size, None
        )
        for inputs, layer in zip(rows, layers, strict=True)
    ]


def scaled_mm(arguments: Arguments) -> Callable[[], list[torch.Tensor]]:
    """vLLM's CUTLASS product of float8 with float8; each row of the inputs has its own factor."""
    from vllm import _custom_ops as ops

    rows = [inputs.contiguous() for inputs in arguments.inputs]
    scales = arguments.scale[..., None].unbind()

    def run() -> list[torch.Tensor]:
        found = []
        for inputs, weight, scale in zip(rows, arguments.weight, scales, strict=True):
            rounded, factors = ops.scaled_fp8_quant(inputs, use_per_token_if_dynamic=True)
            found.append(
                ops.cutlass_scaled_mm(rounded, weight.T, factors, scale, out_dtype=inputs.dtype)
            )
        return found

    return run


PEERS = {"torch": torch_product, "marlin": marlin, "scaled_mm": scaled_mm}


def bench_shape(arguments: Arguments, repeats: int) -> dict[str, Any]:
    """Microseconds and errors of all contenders, or the reason for none."""
    want = arguments.twin()
    arguments.run()
    error = deviation(arguments.out, want)
    if not error <= TOLERANCE:
        raise RuntimeError(f"float8_product is wrong by {error}")
    errors, problems, graphs = {"float8": error}, {}, {"float8": capture(arguments.run)}
    runs = []  # a graph does not keep alive what it reads: a peer's weights in its own order
    for name, make in PEERS.items():
        try:
            runs.append(run := make(arguments))
            found = run()
            found = found if isinstance(found, torch.Tensor) else torch.stack(found)
            errors[name] = deviation(found, want)
            graphs[name] = capture(run)
        except Exception as problem:  # not built for this GPU, or not installed
            problems[name] = reason_of(problem)
    timings = time_in_turns([graph.replay for graph in graphs.values()], repeats=repeats)
    return {
        **{name: timing.as_dict() for name, timing in zip(graphs, timings, strict=True)},
        "errors": errors, "failed": problems,
    }  # fmt: skip


def print_row(label: str, row: dict[str, Any], num_bytes: int) -> None:
    """Times, and the rate at which ours reads its weight."""
    times = (f"{name} {row[name]['median']:.1f}" for name in ("float8", *PEERS) if name in row)
    rate = num_bytes / row["float8"]["median"] * 1e-6
    print(f"{label:<26} {rate:5.2f} TB/s  us: {', '.join(times)} {row['failed'] or ''}", flush=True)


def bench_peers(args: Namespace) -> list[dict[str, Any]]:
    """All shapes until the time is over."""
    rows = []
    for shape in WEIGHTS:
        if time.monotonic() > args.deadline:
            break
        weights = make_weight(shape, args.dtype)
        for num_rows in QUICK_ROWS if args.quick else ROWS:
            row = bench_shape(make_arguments(weights, num_rows), args.repeats)
            rows.append({"weight": shape, "rows": num_rows, **row})
            print_row(f"{shape} x {num_rows}", row, weights[0].numel())
    return rows


def plans(num_rows: int) -> Iterator[Plan]:
    """Launches that may pay for so many rows."""
    padded = min(max(2 ** (num_rows - 1).bit_length(), 16), 256)
    blocks = itertools.product((32, 64, 128), {padded, min(padded, 128)}, (64, 128, 256))
    for (outputs, rows, size), warps, stages in itertools.product(blocks, (4, 8), (3, 4, 6)):
        in_flight = (stages - 1) * outputs * size
        shared = in_flight + (stages - 1) * 2 * rows * size
        # A warp adds up 64 x 64 sums in registers at most.
        fits = outputs * rows <= 4096 * warps and shared <= MOST_SHARED
        # Fewer bytes in flight would not hide the memory's latency.
        if fits and in_flight >= 12 << 10:
            yield Plan(outputs, rows, size, warps, stages)


def compile_plan(dtype: torch.dtype, plan: Plan) -> None:
    """Run it once with a small weight: what is compiled depends on its alignment alone."""
    arguments = make_arguments(make_weight((1, 1024, 4096), dtype), plan.block_rows)
    with contextlib.suppress(Exception):  # fails again where it is recorded
        arguments.run(plan)
        torch.cuda.synchronize()


def time_plan(arguments: Arguments, plan: Plan, want: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Microseconds of a plan, or the reason for none."""
    entry = {"plan": plan._asdict()}
    try:
        arguments.out.fill_(float("nan"))
        arguments.run(plan)
        error = deviation(arguments.out, want)
        if not error <= TOLERANCE:
            return entry | {"failed": f"wrong by {error}"}
        run = partial(arguments.run, plan)
        return entry | time_gpu(run, repeats=repeats, warmup=2).as_dict()
    except Exception as problem:
        return entry | {"failed": reason_of(problem)}


def print_plans(label: str, row: dict[str, Any], num_bytes: int) -> None:
    """The best plans and the chosen one."""
    print(f"{label}: {len(row['plans'])} plans, {row['torch']['median']:.1f} us by cuBLAS")
    for rank, entry in enumerate(row["plans"]):
        if "median" in entry and (rank < SHOWN or entry["chosen"]):
            rate, mark = num_bytes / entry["median"] * 1e-6, " chosen" if entry["chosen"] else ""
            plan = " ".join(f"{value:4}" for value in entry["plan"].values())
            print(f"  {entry['median']:7.2f} us {rate:5.2f} TB/s  {plan}{mark}", flush=True)
    for reason in sorted({entry["failed"][:100] for entry in row["plans"] if "failed" in entry}):
        print(f"  failed: {reason}")


def sweep(args: Namespace) -> list[dict[str, Any]]:
    """Plans of all shapes, best first, until the time is over."""
    counts = QUICK_ROWS if args.quick else ROWS
    begin = time.monotonic()
    wanted = dict.fromkeys(plan for count in counts for plan in plans(count))
    compile_in_pool(partial(compile_plan, args.dtype), wanted, args.processes)
    print(f"{time.monotonic() - begin:.0f} s: compiled", flush=True)
    rows = []
    for shape in WEIGHTS:
        weights = make_weight(shape, args.dtype)
        for num_rows in counts:
            if time.monotonic() > args.deadline:
                return rows
            arguments = make_arguments(weights, num_rows)
            want, chosen = arguments.twin(), plan_for(shape[0] * shape[1], num_rows)
            entries = [
                {"chosen": plan == chosen} | time_plan(arguments, plan, want, args.repeats)
                for plan in dict.fromkeys([chosen, *plans(num_rows)])
            ]
            entries.sort(key=lambda entry: entry.get("median", math.inf))
            peer = time_gpu(torch_product(arguments), repeats=args.repeats).as_dict()
            rows.append({"weight": shape, "rows": num_rows, "torch": peer, "plans": entries})
            print_plans(f"{shape} x {num_rows}", rows[-1], weights[0].numel())
    return rows


def main() -> None:
    parser = sweep_parser(__doc__, seconds=90, processes=14)
    parser.add_argument("--quick", action="store_true", help=f"rows {QUICK_ROWS}")
    parser.add_argument("--sweep", action="store_true", help="time launch plans, not peers")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    args = parse_on_gpu(parser)
    args.deadline = time.monotonic() + args.seconds
    name, args.dtype = args.dtype, getattr(torch, args.dtype)
    print(f"a kernel that does nothing: {start_us():.2f} us")
    benchmark = "float8_product_plans" if args.sweep else "float8_product"
    rows = sweep(args) if args.sweep else bench_peers(args)
    write_record(args.out, {"benchmark": benchmark, "dtype": name, "rows": rows})


if __name__ == "__main__":
    main()
