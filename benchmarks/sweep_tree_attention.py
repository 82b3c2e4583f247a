"""Launch plans of the tree attention kernel, timed shape by shape beside FlashAttention 3.

    python benchmarks/sweep_tree_attention.py --out record.json [--seconds 150] [--processes 14]

Every plan is compiled and run once by a pool of processes, which share Triton's cache on disk,
before the first is timed.  Tiles, stages and splits come first; the best of a shape are then
tried with other ways to join their splits.  A plan that does not compile, needs more shared
memory than there is or computes something else is recorded with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from typing import Any

import torch
from attention_calls import chosen_plan, with_plan
from attention_peers import flash_attention
from attention_shapes import MODELS, TOLERANCE, Shape, floor_us, make_arguments, twin_output
from records import write_record
from timing import parse_on_gpu, reason_of, start_us, sweep_parser, time_gpu

from vllm_medusa.triton_kernels import attention_kernels
from vllm_medusa.triton_kernels.attention import num_multiprocessors
from vllm_medusa.triton_kernels.attention_plan import (
    AttentionPlan,
    ceil_div,
    power_of_two_from,
)

SHAPES = [
    Shape(batch, context, rows, *model)
    for model, cells in {
        MODELS[0]: [(1, 2048, 40), (8, 4096, 64), (1, 512, 40), (1, 2048, 64), (1, 8192, 64),
                    (32, 2048, 16), (8, 512, 16), (32, 512, 8)],
        MODELS[1]: [(8, 4096, 64)],
    }.items()
    for batch, context, rows in cells
]  # fmt: skip
# Rows of a tile, warps, bound on registers (two programs of 8 warps share a multiprocessor's
# registers at 128, three of 4 warps at 168).
TILES = [(16, 4, None), (32, 4, None), (64, 4, None), (64, 4, 168), (128, 8, None), (128, 8, 128),
         (256, 16, None)]  # fmt: skip
KEYS_AND_STAGES = [(32, 4), (64, 2), (64, 3), (64, 4), (128, 2)]
RESIDENT = (1, 2, 3, 4)  # programs that share a multiprocessor
JOIN_ROWS = (0, 2, 4, 8, 16)
REFINED = 5  # plans of a shape that are tried with other joins


def first_plans(shape: Shape) -> list[AttentionPlan]:
    """The chosen plan, then all tiles with as many splits as fill the device."""
    pairs = shape.rows * shape.heads // shape.kv_heads
    multiprocessors = num_multiprocessors(torch.device("cuda"))
    plans = [chosen_plan(shape)]
    for block_rows, warps, registers in TILES:
        if block_rows > power_of_two_from(pairs) or pairs > 8 * block_rows:
            continue
        row_tiles = ceil_div(pairs, block_rows)
        for keys, stages in KEYS_AND_STAGES:
            key_tiles = ceil_div(shape.context + shape.rows, keys)
            for resident in RESIDENT:
                slots = multiprocessors * resident // (shape.batch * shape.kv_heads * row_tiles)
                per_split = ceil_div(key_tiles, max(1, min(slots, key_tiles, 32)))
                splits = ceil_div(key_tiles, per_split)
                join_rows = 8 if splits > 1 else 0
                tile = (block_rows, keys, row_tiles, splits, warps, stages, 1)
                plans.append(AttentionPlan(*tile, join_rows, registers))
    return list(dict.fromkeys(plans))


def more_plans(entries: list[dict[str, Any]]) -> list[AttentionPlan]:
    """The best plans, joined otherwise."""
    best = [AttentionPlan(**entry["plan"]) for entry in entries if "median" in entry][:REFINED]
    known = {AttentionPlan(**entry["plan"]) for entry in entries}
    plans = [
        dataclasses.replace(plan, join_rows=rows)
        for plan in best
        if plan.num_splits > 1
        for rows in JOIN_ROWS
    ]
    return [plan for plan in dict.fromkeys(plans) if plan not in known]


def _compiled_for(shape: Shape, plan: AttentionPlan) -> tuple:
    """What the compiled code depends on."""
    pages = ceil_div(shape.context + shape.rows, 16)
    return (
        dataclasses.replace(plan, row_tiles=1, num_splits=min(plan.num_splits, 2)),
        shape.heads, shape.kv_heads, shape.head_size, pages % 16 == 0, shape.rows % 16 == 0,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _arguments(shape: Shape) -> dict[str, Any]:
    return make_arguments(shape)


def compile_plan(shape: Shape, plan: AttentionPlan) -> dict[str, Any]:
    """Run a plan once: registers, spilled bytes and shared memory, or the reason for none."""
    try:
        with_plan(plan, _arguments(shape))()
        torch.cuda.synchronize()
    except Exception as problem:
        return {"failed": reason_of(problem)}
    kernel = list(attention_kernels.tree_attention_kernel.device_caches[0][0].values())[-1]
    return {
        "registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared
    }  # fmt: skip


def compile_all(
    pool: ProcessPoolExecutor, wanted: Iterable[tuple[Shape, AttentionPlan]], known: dict
) -> None:
    """Add to `known` what each plan takes; code that is shared is compiled once."""
    fresh = {_compiled_for(*one): one for one in wanted if _compiled_for(*one) not in known}
    futures = {pool.submit(compile_plan, *one): key for key, one in fresh.items()}
    for future in as_completed(futures):
        try:
            known[futures[future]] = future.result()
        except Exception as problem:  # its process has ended
            known[futures[future]] = {"failed": f"process: {problem}"[:200]}


def time_plan(
    plan: AttentionPlan, arguments: dict[str, Any], want: torch.Tensor, repeats: int
) -> dict[str, Any]:
    """Microseconds of a plan, or the reason for none."""
    entry = {"plan": dataclasses.asdict(plan)}
    try:
        run = with_plan(plan, arguments)
        arguments["out"].fill_(float("nan"))
        run()
        error = (arguments["out"].float() - want).abs().max().item()
        if not error <= TOLERANCE:
            return entry | {"failed": f"wrong by {error}"}
        return entry | time_gpu(run, repeats=repeats, warmup=2).as_dict()
    except Exception as problem:
        return entry | {"failed": reason_of(problem)}


def time_plans(
    shape: Shape, plans: list[AttentionPlan], known: dict, args: argparse.Namespace
) -> dict[str, Any]:
    """All plans of a shape, best first, those without a time last."""
    arguments = make_arguments(shape)
    want = twin_output(arguments, arguments["tree_masks"])
    entries, chosen = [], chosen_plan(shape)
    for plan in plans:
        takes = known[_compiled_for(shape, plan)]
        entry = {"plan": dataclasses.asdict(plan)} if "failed" in takes else {}
        if not entry and time.monotonic() < args.deadline:
            entry = time_plan(plan, arguments, want, args.repeats)
        entries.append({"chosen": plan == chosen} | entry | takes)
    entries = [entry for entry in entries if "plan" in entry]
    entries.sort(key=lambda entry: entry.get("median", math.inf))
    flash = time_gpu(flash_attention(arguments), repeats=args.repeats).as_dict()
    return {"shape": shape._asdict(), "floor_us": round(floor_us(shape), 2),
            "fa3-causal": flash, "plans": entries}  # fmt: skip


def label(entry: dict[str, Any]) -> str:
    """A plan on one line."""
    plan = AttentionPlan(**entry["plan"])
    return (
        f"{plan.block_rows:3}x{plan.block_keys:<3} tiles {plan.row_tiles} splits "
        f"{plan.num_splits:2} warps {plan.num_warps:2} stages {plan.num_stages} join "
        f"{plan.join_rows:2} bound {plan.max_registers} (registers {entry.get('registers')}, "
        f"spills {entry.get('spills')}, shared {entry.get('shared')})"
        f"{' chosen' if entry['chosen'] else ''}"
    )


def print_best(shape: Shape, row: dict[str, Any], count: int) -> None:
    """The best plans, the one that the launcher takes, and how many have failed."""
    plans = row["plans"]
    failed = [entry for entry in plans if "failed" in entry]
    print(f"{shape} floor {row['floor_us']} fa3-causal {row['fa3-causal']['median']} "
          f"({len(plans)} plans, {len(failed)} failed)")  # fmt: skip
    for rank, entry in enumerate(plans):
        if "median" in entry and (rank < count or entry["chosen"]):
            print(f"  {entry['median']:7.2f} {label(entry)}")
    for reason in sorted({entry["failed"][:100] for entry in failed}):
        print(f"  failed: {reason}")


def main() -> None:
    args = parse_on_gpu(sweep_parser(__doc__, seconds=150, processes=14))
    begin = time.monotonic()
    args.deadline = begin + args.seconds - 5
    print(f"a kernel that does nothing: {start_us():.2f} us")
    rows: dict[Shape, dict[str, Any]] = {}
    known: dict[tuple, dict[str, Any]] = {}
    plans = {shape: first_plans(shape) for shape in SHAPES}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        for name in ("tiles", "joins"):
            compile_all(pool, ((s, plan) for s in SHAPES for plan in plans[s]), known)
            print(f"{time.monotonic() - begin:.0f} s: {len(known)} kernels compiled ({name})",
                  flush=True)  # fmt: skip
            for shape in SHAPES:
                row = time_plans(shape, plans[shape], known, args)
                row["plans"] += rows.get(shape, {"plans": []})["plans"]
                row["plans"].sort(key=lambda entry: entry.get("median", math.inf))
                rows[shape] = row
                if name == "joins":
                    print_best(shape, row, 10)
                plans[shape] = more_plans(row["plans"])
            print(f"{time.monotonic() - begin:.0f} s: {name} timed", flush=True)
    write_record(args.out, {"benchmark": "tree_attention_plans", "rows": list(rows.values())})


if __name__ == "__main__":
    main()
