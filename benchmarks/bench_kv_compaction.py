"""KV compaction of all layers: the one-launch kernel beside PyTorch indexing layer by layer.

    python benchmarks/bench_kv_compaction.py --out record.json [--quick]

Every request accepts late nodes, so each accepted row has to move; with 0 accepted nodes none
has, which is the cost of asking.  The kernel's result is compared with the expected bytes before
it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from records import write_record
from timing import kernel_benchmark_parser, parse_on_gpu, time_gpu

from vllm_medusa.triton_kernels import KVCompactor

BLOCK_SIZE = 16
ROWS = 64
DEVICE = torch.device("cuda")


class Shape(NamedTuple):
    """`row` is K and V of one head, 2 * head size elements of `item_bytes` (1: float8)."""

    batch: int
    layers: int
    kv_heads: int
    row: int
    item_bytes: int
    accepted: int

    def __str__(self) -> str:
        return (
            f"bs{self.batch:<3} layers{self.layers:<3} {self.kv_heads}x{self.row}x"
            f"{8 * self.item_bytes:<3} accepted{self.accepted:<2}"
        )


# Llama-3-8B in bfloat16 and float8, Llama-2-7B, SmolLM2-135M
MODELS = [(32, 8, 256, 2), (32, 8, 256, 1), (32, 32, 256, 2), (30, 3, 128, 2)]
SHAPES = [
    Shape(batch, *model, accepted)
    for model in MODELS
    for batch in (1, 8, 64)
    for accepted in (0, 3, 5)
]
QUICK_SHAPES = [shape for shape in SHAPES if shape[1:5] == MODELS[0] and shape.accepted != 5]
GOALS_US = {Shape(1, *MODELS[0], 3): 5.0, Shape(64, *MODELS[0], 3): 25.0}


def path_of(accepted: int) -> list[int]:
    """Accepted rows, root first; each lies behind its place, the last at row 63."""
    return [0, *(ROWS - 1 - (accepted - j) * 5 for j in range(1, accepted + 1))]


def make_inputs(shape: Shape) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Caches in vLLM's default order (block, slot, head) and the compactor's arguments."""
    pages = ROWS // BLOCK_SIZE + 2
    generator = torch.Generator(DEVICE).manual_seed(0)
    blocks = shape.batch * pages
    caches = [
        torch.randint(
            0, 256, (blocks, BLOCK_SIZE, shape.kv_heads, shape.row * shape.item_bytes),
            dtype=torch.uint8, device=DEVICE, generator=generator,
        ).transpose(1, 2)
        for _ in range(shape.layers)
    ]  # fmt: skip
    if shape.item_bytes == 2:
        caches = [cache.view(torch.int16) for cache in caches]
    order = torch.randperm(blocks, device=DEVICE, generator=generator)
    mask = sum(1 << b for b in path_of(shape.accepted))
    mask -= mask >> 63 << 64
    arguments = {
        "block_table": order.view(shape.batch, pages).to(torch.int32),
        "idx_mapping": torch.arange(shape.batch, device=DEVICE),
        "root_positions": torch.arange(shape.batch, device=DEVICE) % BLOCK_SIZE,
        "path_masks": torch.full((shape.batch,), mask, device=DEVICE),
    }
    return caches, arguments


def places(arguments: dict[str, Any], rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and slots, ``[batch, len(rows)]`` each, of tree rows."""
    offsets = torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    keys = arguments["root_positions"][:, None] + offsets
    blocks = arguments["block_table"].gather(1, keys // BLOCK_SIZE).long()
    return blocks, keys % BLOCK_SIZE


def indexing(shape: Shape, caches: list[torch.Tensor], arguments: dict[str, Any]) -> Callable:
    """PyTorch's way: two indexing kernels per layer, the places known beforehand."""
    path = path_of(shape.accepted)
    source, target = places(arguments, path[1:]), places(arguments, list(range(1, len(path))))

    def run() -> None:
        for cache in caches:
            cache[target[0], :, target[1]] = cache[source[0], :, source[1]]

    return run


def bench_shape(shape: Shape, repeats: int) -> dict[str, Any]:
    """Check the kernel, then time both."""
    caches, arguments = make_inputs(shape)
    want = [cache.clone() for cache in caches]
    indexing(shape, want, arguments)()
    compactor = KVCompactor(caches)
    compactor(**arguments)
    correct = all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))
    # Replays move garbage over garbage, at the same addresses.
    kernel = time_gpu(lambda: compactor(**arguments), repeats=repeats)
    torch_way = time_gpu(indexing(shape, caches, arguments), repeats=repeats)
    row_bytes = shape.kv_heads * shape.row * shape.item_bytes
    moved = 2 * shape.batch * shape.layers * shape.accepted * row_bytes
    return {
        "shape": shape._asdict(), "goal_us": GOALS_US.get(shape), "correct": correct,
        "bytes_read_and_written": moved,
        "gigabytes_per_second": round(moved / kernel.median / 1e3, 1),
        "kernel": kernel.as_dict(), "torch_indexing": torch_way.as_dict(),
    }  # fmt: skip


def main() -> None:
    args = parse_on_gpu(kernel_benchmark_parser(__doc__, "Llama-3-8B in bfloat16 only"))
    print(f"{'microseconds':<34}{'kernel':>11}{'p90-p10':>11}{'indexing':>11}{'GB/s':>11}{'goal':>11}")
    rows = []
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        row = bench_shape(shape, args.repeats)
        rows.append(row)
        mark = "" if row["correct"] else "  WRONG"
        times = row["kernel"]
        cells = [times["median"], times["p90"] - times["p10"], row["torch_indexing"]["median"]]
        cells += [row["gigabytes_per_second"], row["goal_us"] or float("nan")]
        print(f"{shape!s:<34}" + "".join(f"{cell:11.1f}" for cell in cells) + mark, flush=True)
    write_record(args.out, {"benchmark": "kv_compaction", "block_size": BLOCK_SIZE, "rows": rows})


if __name__ == "__main__":
    main()
