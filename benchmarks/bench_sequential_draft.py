"""What it costs to draft a tree with sequential heads, and which kernels take the time.

    python benchmarks/bench_sequential_draft.py --out record.json [--quick]

The shipped sequential heads' number of heads and blocks, and their tree, at a larger model's
shape: random weights, the first ids of its lm_head.  `score` is one CUDA graph, as in a served
step; a profile of its replays names every launch.  `floor` is the time that reading all weights
once a level takes.  `products` times the matrix products of each level alone: the first layer with
all its matrices side by side (`joined`) and one after the other (`batched`), a further one
(`block`) and the lm_head.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from profile_step import gpu_kernels
from records import write_record
from timing import kernel_benchmark_parser, parse_on_gpu, time_gpu
from torch.nn import functional

import vllm_medusa
from vllm_medusa.checkpoint import load_heads
from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.sequential_draft import SequentialDrafter
from vllm_medusa.tree import TokenTree

DEVICE = torch.device("cuda")
HEADS = Path(vllm_medusa.__file__).parent / "assets" / "smollm2-135m-instruct-sequential"
BANDWIDTH = 3.0e12  # bytes/s, an H100's measured rate
DEVIATION = 0.02
REPLAYS = 20


class Shape(NamedTuple):
    """A batch, and the model that it runs on."""

    batch: int
    ids: int  # that the heads score
    hidden: int = 4096
    vocab: int = 128_256

    def __str__(self) -> str:
        return f"bs{self.batch:<3} x{self.ids:<6} hidden{self.hidden:<4}"


SHAPES = [Shape(batch, ids) for ids in (32_064, 16_384) for batch in (1, 8, 32)]
QUICK_SHAPES = [Shape(1, 32_064), Shape(1, 16_384)]


class Draft:
    """Random heads of a shape, and what they draft from."""

    def __init__(self, shape: Shape):
        small = load_heads(HEADS)
        self.tree = TokenTree.load(HEADS / "tree.json")
        self.spec = HeadSpec(
            small.spec.num_heads, small.spec.num_layers, shape.hidden, shape.vocab,
            bias=small.spec.bias, own_lm_head=True, common_lm_head=True,
            vocab_subset_size=shape.ids, sequential=True,
        )  # fmt: skip
        torch.manual_seed(0)
        self.heads = MedusaHeads(self.spec, DEVICE)
        for parameter in self.heads.parameters():
            torch.nn.init.normal_(parameter, std=DEVIATION)
        self.embeddings = torch.randn(
            shape.vocab, shape.hidden, device=DEVICE, dtype=self.spec.dtype
        )
        self.hidden = torch.randn(
            shape.batch, shape.hidden, device=DEVICE, dtype=self.spec.dtype
        )
        self.roots = torch.arange(shape.batch, device=DEVICE)
        self.drafter = SequentialDrafter(self.heads, self.tree)

    def score(self) -> None:
        """Draft all nodes."""
        self.drafter.score(self.hidden, self.roots, lambda ids: self.embeddings[ids])

    def level_rows(self) -> list[int]:
        """Rows of the products of each level."""
        batch = self.hidden.shape[0]
        levels = self.drafter._levels[self.drafter._num_nodes(batch)]
        return [batch * level.paths.shape[0] for level in levels]

    def num_bytes(self) -> int:
        """Weights that a draft reads, those of the lm_head once a level."""
        spec = self.spec
        square = spec.hidden_size**2
        matrices = spec.num_heads * spec.num_layers + spec.num_path_weights
        lm_head = spec.num_heads * spec.output_size * spec.hidden_size
        return (matrices * square + lm_head) * spec.dtype.itemsize


def launches(function: Callable[[], None]) -> list[dict[str, Any]]:
    """Kernels of one call inside a CUDA graph: how often and how long, the longest first."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in gpu_kernels(profile):
        found[kernel.name].append(kernel.end - kernel.start)
    rows = [
        {"kernel": name, "launches": len(times) / REPLAYS, "us": round(sum(times) / REPLAYS, 2)}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def products(draft: Draft, repeats: int) -> list[dict[str, float]]:
    """Microseconds of each level's matrix products by themselves; for its rows."""
    spec = draft.spec
    size, lm_head = spec.hidden_size, draft.heads.lm_head[0]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=spec.dtype) * DEVIATION

    found = []
    for head, rows in enumerate(draft.level_rows(), start=1):
        parts = head + 1
        inputs, joined = random(rows, parts, size), random(size, parts * size)
        batched, turned = joined.view(parts, size, size), joined.view(parts * size, size)
        runs = {
            "block": lambda x=inputs, w=batched: functional.linear(x[:, 0], w[0]),
            "joined": lambda x=inputs, w=joined: functional.linear(x.flatten(1), w),
            "joined, transposed": lambda x=inputs, w=turned: x.flatten(1) @ w,
            "batched": lambda x=inputs, w=batched: torch.bmm(x.transpose(0, 1), w.transpose(1, 2)),
            "lm_head": lambda x=inputs: functional.linear(x[:, 0], lm_head),
        }
        times = {name: time_gpu(run, repeats=repeats).median for name, run in runs.items()}
        found.append({"rows": rows, **times})
    return found


def bench_shape(shape: Shape, repeats: int) -> dict[str, Any]:
    """Time the draft, then its launches and products."""
    draft = Draft(shape)
    with torch.inference_mode():
        return {
            "shape": shape._asdict(), "tree_nodes": draft.tree.num_nodes,
            "rows_by_level": draft.level_rows(),
            "floor_us": round(draft.num_bytes() / BANDWIDTH * 1e6, 1),
            "score": time_gpu(draft.score, repeats=repeats).as_dict(),
            "launches": launches(draft.score), "products_us": products(draft, repeats),
        }  # fmt: skip


def print_row(shape: Shape, row: dict[str, Any]) -> None:
    count = sum(kernel["launches"] for kernel in row["launches"])
    busy = sum(kernel["us"] for kernel in row["launches"])
    print(
        f"{shape!s:<28} rows {row['rows_by_level']}: {row['score']['median']:.1f} us, floor "
        f"{row['floor_us']:.1f}, {count:g} launches busy for {busy:.1f}"
    )
    for kernel in row["launches"]:
        print(f"{kernel['us']:9.1f} us {kernel['launches']:6g} x {kernel['kernel'][:100]}")
    for level in row["products_us"]:
        print("  products:", ", ".join(f"{name} {time:.1f}" for name, time in level.items()))
    print(flush=True)


def main() -> None:
    args = parse_on_gpu(kernel_benchmark_parser(__doc__, "one request"))
    rows = []
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        rows.append(bench_shape(shape, args.repeats))
        print_row(shape, rows[-1])
    write_record(args.out, {"benchmark": "sequential_draft", "rows": rows})


if __name__ == "__main__":
    main()
