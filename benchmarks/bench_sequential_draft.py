"""What it costs to draft a tree with sequential heads, and which kernels take the time.

    python benchmarks/bench_sequential_draft.py --out record.json [--quick]

The shipped sequential heads' number of heads and blocks, and their tree, at a larger model's
shape: random weights, the first ids of its lm_head.  `score` is one CUDA graph, as in a served
step; a profile of its replays names every launch.  `floor` is the time that reading all weights
once a level takes.  The peer drafts the same tree with PyTorch's operators, each matrix of the
first layer by itself; before both are timed their tokens are compared in float32, since in
bfloat16 random heads find many tokens equally likely.  `float8` drafts with rounded weights, half
the bytes of the floor.  `products` times the matrix products of each level alone: the first layer
with all its matrices side by side (`joined`) and one after the other (`batched`), a further one
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
from timing import BANDWIDTH, kernel_benchmark_parser, parse_on_gpu, time_gpu
from torch.nn import functional

import vllm_medusa
from vllm_medusa.checkpoint import load_heads
from vllm_medusa.draft_weights import Float8Weight, PlainWeight
from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.heads_path import path_update
from vllm_medusa.sequential_draft import SequentialDrafter
from vllm_medusa.sequential_heads import SequentialHeads
from vllm_medusa.tree import TokenTree

DEVICE = torch.device("cuda")
HEADS = Path(vllm_medusa.__file__).parent / "assets" / "smollm2-135m-instruct-sequential"
DEVIATION = 0.02
REPLAYS = 20


class Shape(NamedTuple):
    """A batch, and the model that it runs on."""

    batch: int
    ids: int  # that the first head scores
    later_ids: int  # that the others score
    hidden: int = 4096
    vocab: int = 128_256

    def __str__(self) -> str:
        return f"bs{self.batch:<3} x{self.ids}, x{self.later_ids} hidden{self.hidden}"


SIZES = ((32_064, 16_032), (32_064, 32_064))
SHAPES = [Shape(batch, *sizes) for batch in (1, 8, 32) for sizes in SIZES]
QUICK_SHAPES = SHAPES[:2]


class Draft:
    """Random heads of a shape, and what they draft from."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.bfloat16,
        kind: type[PlainWeight] | type[Float8Weight] = PlainWeight,
    ):
        small = load_heads(HEADS)
        self.tree = TokenTree.load(HEADS / "tree.json")
        self.spec = HeadSpec(
            small.spec.num_heads, small.spec.num_layers, shape.hidden, shape.vocab,
            bias=small.spec.bias, own_lm_head=True, common_lm_head=True,
            vocab_subset_size=shape.ids, sequential=True, dtype=dtype,
        )  # fmt: skip
        torch.manual_seed(0)
        self.heads = MedusaHeads(self.spec, DEVICE).requires_grad_(False)
        for parameter in self.heads.parameters():
            torch.nn.init.normal_(parameter, std=DEVIATION)
        self.embeddings = torch.randn(shape.vocab, shape.hidden, device=DEVICE, dtype=dtype)
        self.hidden = torch.randn(shape.batch, shape.hidden, device=DEVICE, dtype=dtype)
        self.roots = torch.arange(shape.batch, device=DEVICE)
        heads = SequentialHeads(self.heads.to_weights(), DEVICE, shape.later_ids, kind)
        self.drafter = SequentialDrafter(heads, self.tree, shape.batch)
        self.levels = self.drafter.levels_for(shape.batch)
        # Parents and ranks of each level's nodes.
        self.children = [torch.where(level.columns >= 0) for level in self.levels]

    def score(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft all nodes."""
        return self.drafter.score(self.hidden, self.roots, self.embeddings)

    def lm_head_of(self, head: int) -> torch.Tensor:
        """Its rows of the common lm_head, heads counted from 1."""
        return self.heads.lm_head[0, : self.drafter.heads.size_of(head)]

    def level_rows(self) -> list[int]:
        """Rows of the products of each level."""
        return [len(self.hidden) * len(level.paths) for level in self.levels]

    def peer(self) -> torch.Tensor:
        """The same tokens, [batch, columns] int64, with PyTorch's operators."""
        num_reqs, size = self.hidden.shape
        width = self.tree.max_depth * self.drafter.columns_per_head
        tokens = self.roots.new_full((num_reqs, width), -1)
        log_probs = self.hidden.new_full((num_reqs, width), float("-inf"))
        for head, level in enumerate(self.levels, start=1):
            known = torch.cat([tokens, self.roots[:, None]], dim=1)
            path = self.embeddings[known[:, level.paths]].view(-1, head, size)
            states = self.hidden.repeat_interleave(len(level.paths), dim=0)
            for layer in range(self.spec.num_layers):
                weight, bias = self.heads.weight[layer, head - 1], self.heads.bias[layer, head - 1]
                update = functional.linear(states, weight, bias)
                if layer == 0:
                    update = update + path_update(self.heads.path_weight, path, head)
                states = states + functional.silu(update)
            logits = functional.linear(states, self.lm_head_of(head))
            top = logits.log_softmax(-1).topk(level.columns.shape[1])
            parents, ranks = self.children[head - 1]
            columns = level.columns[parents, ranks].long()
            for table, found in ((tokens, top.indices), (log_probs, top.values)):
                table[:, columns] = found.unflatten(0, (num_reqs, -1))[:, parents, ranks]
        return tokens

    def num_bytes(self) -> int:
        """Weights that a draft reads, those of the lm_head once a level."""
        spec = self.spec
        square = spec.hidden_size**2
        matrices = spec.num_heads * spec.num_layers + spec.num_path_weights
        heads = range(1, spec.num_heads + 1)
        lm_heads = sum(self.lm_head_of(head).numel() for head in heads)
        return (matrices * square + lm_heads) * spec.dtype.itemsize


def launches(function: Callable[[], object]) -> list[dict[str, Any]]:
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
    size = spec.hidden_size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=spec.dtype) * DEVIATION

    found = []
    for head, rows in enumerate(draft.level_rows(), start=1):
        parts = head + 1
        inputs, joined = random(rows, parts, size), random(size, parts * size)
        batched, turned = joined.view(parts, size, size), joined.view(parts * size, size)
        lm_head = draft.lm_head_of(head)
        runs = {
            "block": lambda x=inputs, w=batched: functional.linear(x[:, 0], w[0]),
            "joined": lambda x=inputs, w=joined: functional.linear(x.flatten(1), w),
            "joined, transposed": lambda x=inputs, w=turned: x.flatten(1) @ w,
            "batched": lambda x=inputs, w=batched: torch.bmm(x.transpose(0, 1), w.transpose(1, 2)),
            "lm_head": lambda x=inputs, w=lm_head: functional.linear(x[:, 0], w),
        }
        times = {name: time_gpu(run, repeats=repeats).median for name, run in runs.items()}
        found.append({"rows": rows, **times})
    return found


@torch.inference_mode()
def bench_shape(shape: Shape, repeats: int) -> dict[str, Any]:
    """Check, then time both drafts, their launches and the products."""
    exact = Draft(shape, torch.float32)
    correct = torch.equal(exact.score()[0].flatten(1), exact.peer())
    del exact
    rounded = Draft(shape, kind=Float8Weight)
    in_float8 = {
        "float8": time_gpu(rounded.score, repeats=repeats).as_dict(),
        "float8_launches": launches(rounded.score),
    }
    del rounded
    draft = Draft(shape)
    return {
        "shape": shape._asdict(), "tree_nodes": draft.tree.num_nodes,
        "rows_by_level": draft.level_rows(), "correct": correct,
        "floor_us": round(draft.num_bytes() / BANDWIDTH * 1e6, 1),
        "score": time_gpu(draft.score, repeats=repeats).as_dict(),
        "peer": time_gpu(draft.peer, repeats=repeats).as_dict(),
        **in_float8, "launches": launches(draft.score), "peer_launches": launches(draft.peer),
        "products_us": products(draft, repeats),
    }  # fmt: skip


def print_row(shape: Shape, row: dict[str, Any]) -> None:
    mark = "" if row["correct"] else "  WRONG"
    print(f"{shape!s:<28} rows {row['rows_by_level']}, floor {row['floor_us']:.1f} us{mark}")
    sides = (("score", "launches"), ("float8", "float8_launches"), ("peer", "peer_launches"))
    for side, key in sides:
        kernels = row[key]
        count, busy = (sum(kernel[name] for kernel in kernels) for name in ("launches", "us"))
        time = row[side]["median"]
        print(f"  {side}: {time:.1f} us, {count:g} launches busy for {busy:.1f}")
        for kernel in kernels:
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
