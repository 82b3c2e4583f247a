"""Shapes of tree attention, their tensors and what they cost at least, for its benchmarks."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
from timing import BANDWIDTH, PRODUCT_RATE

from vllm_medusa.triton_kernels import reference

DEVICE = torch.device("cuda")
BLOCK_SIZE = 16  # vLLM's default page
# bfloat16 weights and output against float32: 2^-8 of outputs up to about 2.
TOLERANCE = 2e-2


class Shape(NamedTuple):
    """One row of the table; `rows` are query rows per request, root included."""

    batch: int
    context: int
    rows: int
    heads: int
    kv_heads: int
    head_size: int

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}x{self.head_size}"
        return f"bs{self.batch:<3} ctx{self.context:<5} rows{self.rows:<3} {heads:<10}"


MODELS = [(32, 8, 128), (32, 32, 128), (9, 3, 64)]


def as_int64(masks: list[int]) -> torch.Tensor:
    """Unsigned masks as int64 words: ``[rows]``, or ``[2, rows]`` for more than 64 rows."""
    parts = [[mask >> low & (1 << 64) - 1 for mask in masks] for low in range(0, len(masks), 64)]
    words = [[word - (word >> 63 << 64) for word in part] for part in parts]
    return torch.tensor(words if len(words) > 1 else words[0], device=DEVICE)


def tree_masks(rows: int) -> torch.Tensor:
    """Ancestor words of a random tree, the same for a given number of rows."""
    rng = random.Random(rows)
    masks = [1]
    for row in range(1, rows):
        masks.append(masks[rng.randrange(row)] | 1 << row)
    return as_int64(masks)


def chain_masks(rows: int) -> torch.Tensor:
    """Ancestor words of a chain, which is what causal attention computes."""
    return as_int64([(1 << row + 1) - 1 for row in range(rows)])


def make_arguments(shape: Shape) -> dict[str, Any]:
    """Arguments of tree_attention for one shape, pages in random order."""
    pages = math.ceil((shape.context + shape.rows) / BLOCK_SIZE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    cache = normal(shape.batch * pages, BLOCK_SIZE, shape.kv_heads, 2 * shape.head_size)
    k_cache, v_cache = cache.split(shape.head_size, -1)
    order = torch.randperm(shape.batch * pages, generator=generator, device=DEVICE)
    q = normal(shape.batch * shape.rows, shape.heads, shape.head_size)
    masks = tree_masks(shape.rows)
    return {
        "out": torch.empty_like(q),
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": order.view(shape.batch, pages).to(torch.int32),
        "query_start_loc": torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE)
        * shape.rows,
        "seq_lens": torch.full(
            (shape.batch,), shape.context + shape.rows, dtype=torch.int32, device=DEVICE
        ),
        "tree_masks": masks.expand(shape.batch, *masks.shape).contiguous(),
        "scale": shape.head_size**-0.5,
        "num_reqs": shape.batch,
        "max_query_len": shape.rows,
        "max_seq_len": shape.context + shape.rows,
    }


def twin_output(arguments: dict[str, Any], masks: torch.Tensor) -> torch.Tensor:
    """float32 output of the twin under `masks`."""
    exact = dict(arguments) | {"tree_masks": masks}
    for name in ("q", "k_cache", "v_cache"):
        exact[name] = exact[name].float()
    # Converted halves are dense; both need the same strides, which they have.
    exact["out"] = torch.empty_like(exact["q"])
    reference.tree_attention(**exact)
    return exact["out"]


def work_of(shape: Shape) -> tuple[float, float]:
    """Bytes of keys and values, and FLOP of both products."""
    keys = shape.context + shape.rows
    kv_bytes = shape.batch * keys * shape.kv_heads * shape.head_size * 2 * 2
    return kv_bytes, 4 * shape.batch * shape.rows * keys * shape.heads * shape.head_size


def floor_us(shape: Shape) -> float:
    """The larger of KV bytes at 3.0 TB/s and products at 800 TFLOP/s (an H100's measured rates)."""
    kv_bytes, flop = work_of(shape)
    return max(kv_bytes / BANDWIDTH, flop / PRODUCT_RATE) * 1e6
