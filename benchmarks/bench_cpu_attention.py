"""Verification attention on a CPU: tree rows against a causal chain in vLLM's own kernel.

    python benchmarks/bench_cpu_attention.py --threads 1 2

Both sides read the same paged caches of several layers in turn, as a model does, and
take turns in every round.  Per case: microseconds per layer, microseconds of the step's
plan (vLLM: its scheduler metadata), and the ratio.  Compaction of two accepted nodes per
request over all layers of the model follows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import write_record
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from vllm_medusa.cpu_attention import LayerCache, tree_attention
from vllm_medusa.cpu_compaction import CPUKVCompactor
from vllm_medusa.cpu_tree_plan import plan_trees

BLOCK_SIZE = 128
CASES = [(1, context, rows) for context in (128, 512, 1500) for rows in (1, 9, 17, 33, 64)] + [
    (batch, 512, rows) for batch in (8, 32) for rows in (9, 17)
]


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], help="query, KV, size")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model, compacted")
    parser.add_argument("--attended", type=int, default=6, help="layers attended in turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu_attention.json"
    )
    return parser.parse_args()


class Case:
    """One batch over the caches of several layers; its tree is a chain, as vLLM's rows are."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, batch: int, context: int,
                 rows: int):  # fmt: skip
        self.heads, self.kv_heads, self.size = args.heads
        self.dtype, self.batch, self.rows, self.keys = dtype, batch, rows, context + rows
        blocks = -(-self.keys // BLOCK_SIZE)
        shape = (args.attended, batch * blocks, self.kv_heads, BLOCK_SIZE, 2 * self.size)
        self.caches = torch.empty(shape, dtype=dtype).normal_()
        self.layers = [LayerCache(cache) for cache in self.caches]
        self.table = torch.randperm(batch * blocks).view(batch, blocks).int()
        self.query = torch.randn(batch * rows, self.heads, self.size).to(dtype)
        self.output = torch.empty_like(self.query)
        self.starts = torch.arange(batch + 1, dtype=torch.int32) * rows
        self.lens = torch.full((batch,), self.keys, dtype=torch.int32)
        self.masks = torch.full((batch, rows), -1, dtype=torch.int64)
        self.masks &= torch.tensor([(2 << row) - 1 if row < 63 else -1 for row in range(rows)])

    def plan(self) -> Any:
        """Our work once per step."""
        return plan_trees(
            np.full(self.batch, self.rows),
            self.lens.numpy(),
            self.table,
            self.masks,
            block_size=BLOCK_SIZE,
            num_heads=self.heads,
        )

    def metadata(self) -> torch.Tensor:
        """vLLM's work once per step."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.batch,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            seq_lens=self.lens,
            dtype=self.dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa="vec",
            enable_kv_split=True,
        )

    def tree(self, plan: Any, layer: int) -> None:
        """One layer by our code."""
        cache = self.layers[layer]
        tree_attention(self.output, self.query, cache, plan, scale=self.size**-0.5)

    def chain(self, metadata: torch.Tensor, layer: int) -> None:
        """One layer by vLLM's kernel."""
        blocks, kv_heads, slots, width = self.caches.shape[1:]
        cache = self.caches[layer].view(blocks, kv_heads, 2 * slots, width // 2)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=keys,
            value_cache=values,
            output=self.output,
            query_start_loc=self.starts,
            seq_lens=self.lens,
            scale=self.size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )


def seconds(function: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summary(times: list[float]) -> dict[str, float]:
    """Microseconds: median, and the least disturbed tenth of a shared machine."""
    ordered = sorted(1e6 * t for t in times)
    return {
        "median": round(statistics.median(ordered), 1),
        "p10": round(ordered[len(ordered) // 10], 1),
    }


def measure(args: argparse.Namespace, threads: int, dtype_name: str, case: tuple) -> dict:
    """One row of the record."""
    batch, context, rows = case
    work = Case(args, getattr(torch, dtype_name), batch, context, rows)
    times: dict[str, list[float]] = {name: [] for name in ("tree", "vllm", "plan", "metadata")}
    plan, metadata = work.plan(), work.metadata()
    work.tree(plan, 0)
    tree_output = work.output.clone()
    work.chain(metadata, 0)
    error = (tree_output.float() - work.output.float()).abs().max().item()
    for _ in range(args.rounds):
        times["plan"].append(seconds(work.plan))
        times["metadata"].append(seconds(work.metadata))
        for layer in range(args.attended):
            times["tree"].append(seconds(partial(work.tree, plan, layer)))
            times["vllm"].append(seconds(partial(work.chain, metadata, layer)))
    row: dict[str, Any] = {"threads": threads, "dtype": dtype_name, "batch": batch}
    row |= {"context": context, "rows": rows, "max_difference": error}
    row |= {f"{name}_us": summary(samples) for name, samples in times.items()}
    row["ratio_p10"] = round(row["tree_us"]["p10"] / row["vllm_us"]["p10"], 3)
    return row


def measure_compaction(args: argparse.Namespace, threads: int, batch: int) -> dict:
    """Two accepted nodes per request, over every layer of the model."""
    _, kv_heads, size = args.heads
    pages = 5 * batch
    caches = torch.empty(args.layers, pages, kv_heads, BLOCK_SIZE, 2 * size, dtype=torch.bfloat16)
    caches.zero_()
    compact = CPUKVCompactor(list(caches))
    rng = np.random.default_rng(0)
    table = torch.randperm(pages).view(batch, 5).int()
    slots = torch.arange(batch)
    roots = torch.from_numpy(rng.integers(100, 570, batch))
    nodes = [(int(rng.integers(2, 5)), int(rng.integers(6, 16))) for _ in range(batch)]
    masks = torch.tensor([1 | 1 << first | 1 << second for first, second in nodes])
    other_data = torch.zeros(16 << 20)  # the model's weights pass between two steps
    times = []
    for _ in range(args.rounds):
        other_data.add_(1)
        times.append(seconds(lambda: compact(table, slots, roots, masks)))
    row = {"threads": threads, "batch": batch, "layers": args.layers}
    return row | {"compaction_us": summary(times[1:])}


@torch.inference_mode()
def main() -> None:
    """Measure, print a table, write the record."""
    args = parse_args()
    if not current_platform.is_cpu():
        raise SystemExit("this benchmark needs vLLM's CPU build")
    current_platform.import_kernels()
    torch.manual_seed(0)
    attention, compaction = [], []
    print("us per layer, p10: threads dtype     batch context rows |   tree   vLLM ratio |  plan")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype_name in args.dtypes:
            for case in CASES:
                row = measure(args, threads, dtype_name, case)
                attention.append(row)
                print(
                    f"{threads:27d} {dtype_name:9} {case[0]:5d} {case[1]:7d} {case[2]:4d} |"
                    f" {row['tree_us']['p10']:6.0f} {row['vllm_us']['p10']:6.0f}"
                    f" {row['ratio_p10']:5.2f} | {row['plan_us']['p10']:5.0f}",
                    flush=True,
                )
        for batch in (1, 8, 32):
            row = measure_compaction(args, threads, batch)
            compaction.append(row)
            print(f"compaction, {threads} threads, batch {batch}: {row['compaction_us']}")
    write_record(args.out, {"attention": attention, "compaction": compaction})


if __name__ == "__main__":
    main()
