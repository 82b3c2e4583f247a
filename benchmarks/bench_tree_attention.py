"""Tree attention beside vLLM's Triton attention, FlashAttention 3, FlashInfer and xformers.

    python benchmarks/bench_tree_attention.py --out record.json [--quick]

All kernels read the same paged bfloat16 cache.  "fa3+tree" is the two-part route.  The Triton
peer gets the tree as its ``qq_bias`` (one mask for the whole batch); FlashAttention cannot take
one and runs the same rows causally, as a chain, which is the cost of verification without a
tree.  FlashInfer gets a custom mask, xformers (in pages of 64) runs its own tree attention; both
are left out, with the reason, where they are not installed.  Every output is compared with the
PyTorch twin in float32 before it is timed.  A peer that fails is reported in its column.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import attention_peers
import torch
from records import write_record
from timing import BANDWIDTH, kernel_benchmark_parser, parse_on_gpu, time_gpu

from vllm_medusa.triton_kernels import add_tree_attention, attention, reference, tree_attention
from vllm_medusa.triton_kernels.attention_plan import (
    MOST_COUNTERS,
    AttentionPlan,
    workspace_elements,
)

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


def join_counters() -> torch.Tensor:
    """Zeros that a call leaves as it finds them."""
    return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=DEVICE)


def ours(arguments: dict[str, Any]) -> Callable[[], None]:
    """This package's kernel, with counters of the server's, as the plugin calls it."""
    counters = join_counters()
    return lambda: tree_attention(counters=counters, **arguments)


def vllm_triton(arguments: dict[str, Any]) -> Callable[[], None]:
    """vLLM's unified Triton attention with the tree as an additive bias."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    a, rows = arguments, arguments["max_query_len"]
    bias = torch.where(attention_peers.ancestor_bits(a), 0.0, float("-inf")).contiguous()
    return lambda: unified_attention(
        q=a["q"], k=a["k_cache"], v=a["v_cache"], out=a["out"],
        cu_seqlens_q=a["query_start_loc"], max_seqlen_q=rows, seqused_k=a["seq_lens"],
        max_seqlen_k=a["max_seq_len"], softmax_scale=a["scale"], causal=True,
        window_size=(-1, -1), block_table=a["block_table"], softcap=0, q_descale=None,
        k_descale=None, v_descale=None, qq_bias=bias,
    )  # fmt: skip


def flash_attention(arguments: dict[str, Any]) -> Callable[[], None]:
    """FlashAttention 3, causal."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    a = arguments
    return lambda: flash_attn_varlen_func(
        q=a["q"], k=a["k_cache"], v=a["v_cache"], out=a["out"],
        cu_seqlens_q=a["query_start_loc"], max_seqlen_q=a["max_query_len"],
        seqused_k=a["seq_lens"], max_seqlen_k=a["max_seq_len"], softmax_scale=a["scale"],
        causal=True, block_table=a["block_table"], fa_version=3,
    )  # fmt: skip


def ours_causal(arguments: dict[str, Any]) -> Callable[[], None]:
    """This package's kernel with the masks of a chain: what the tree's mask costs."""
    chain = chain_masks(arguments["max_query_len"])
    chain = chain.expand(arguments["num_reqs"], *chain.shape).contiguous()
    return ours(arguments | {"tree_masks": chain})


def two_parts(arguments: dict[str, Any]) -> Callable[[], None]:
    """FlashAttention 3 over the context, this package's kernel for the tree's own keys."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    a = arguments
    context = a["seq_lens"] - a["max_query_len"]

    def run() -> None:
        out, lse = flash_attn_varlen_func(
            q=a["q"], k=a["k_cache"], v=a["v_cache"], out=a["out"],
            cu_seqlens_q=a["query_start_loc"], max_seqlen_q=a["max_query_len"],
            seqused_k=context, max_seqlen_k=a["max_seq_len"], softmax_scale=a["scale"],
            causal=False, block_table=a["block_table"], fa_version=3, return_softmax_lse=True,
        )  # fmt: skip
        add_tree_attention(lse=lse, **a | {"out": out})

    return run


KERNELS: dict[str, Callable] = {
    "tree": ours, "tree-causal": ours_causal, "fa3+tree": two_parts,
    "triton-qq-bias": vllm_triton, "fa3-causal": flash_attention,
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


def measure(
    make: Callable, arguments: dict[str, Any], want: torch.Tensor, repeats: int
) -> dict[str, Any]:
    """Error and times of one kernel, or the reason why there are none."""
    try:
        run = make(arguments)
        arguments["out"].fill_(float("nan"))
        run()
        error = (arguments["out"].float() - want).abs().max().item()
        timing = time_gpu(run, repeats=repeats)
    except Exception as problem:
        torch.cuda.synchronize()
        return {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0][:300]}
    return {"max_error": error, "correct": error <= TOLERANCE, **timing.as_dict()}


def floor_us(shape: Shape) -> float:
    """The larger of KV bytes at 3.0 TB/s and products at 800 TFLOP/s (an H100's measured rates)."""
    keys = shape.context + shape.rows
    kv_bytes = shape.batch * keys * shape.kv_heads * shape.head_size * 2 * 2
    flops = 4 * shape.batch * shape.rows * keys * shape.heads * shape.head_size
    return max(kv_bytes / BANDWIDTH, flops / 800e12) * 1e6


def bench_shape(shape: Shape, repeats: int) -> dict[str, Any]:
    """All kernels on one shape."""
    arguments = make_arguments(shape)
    chain = chain_masks(shape.rows)
    chain = chain.expand(shape.batch, *chain.shape)
    want_tree = twin_output(arguments, arguments["tree_masks"])
    want_chain = twin_output(arguments, chain)
    results = {
        name: measure(make, arguments, want_chain if "causal" in name else want_tree, repeats)
        for name, make in present().items()
    }
    return {"shape": shape._asdict(), "floor_us": round(floor_us(shape), 2), "kernels": results}


def print_row(shape: Shape, row: dict[str, Any]) -> None:
    cells = []
    for name in present():
        result = row["kernels"][name]
        if "failed" in result:
            cells.append(f"{'failed':>16}")
        else:
            mark = " " if result["correct"] else "!"
            cells.append(f"{result['median']:9.1f} ±{result['p90'] - result['p10']:5.1f}{mark}")
    print(f"{shape} {row['floor_us']:8.1f} {' '.join(cells)}", flush=True)


def with_plan(plan: AttentionPlan, a: dict[str, Any]) -> Callable[[], None]:
    """The kernel under a plan that the launcher may not choose."""
    num_tokens, heads, head_size = a["q"].shape
    elements = workspace_elements(num_tokens, heads, head_size, plan.num_splits)
    workspace = torch.empty(elements, dtype=torch.float32, device=DEVICE)
    counters = join_counters()
    tensors = [a[name] for name in ("out", "q", "k_cache", "v_cache", "block_table",
                                    "query_start_loc", "seq_lens", "tree_masks")]  # fmt: skip
    return lambda: attention.launch(
        plan, *tensors, a["scale"], a["num_reqs"], a["max_query_len"], 0, 0.0, *[None] * 4,
        workspace, counters,
    )  # fmt: skip


def main() -> None:
    parser = kernel_benchmark_parser(__doc__, "a few shapes, about two minutes")
    args = parse_on_gpu(parser)
    for name, reason in left_out().items():
        print(f"{name} left out: {reason}")
    print(f"{'microseconds, median ± (p90 - p10), ! = wrong':<38} {'floor':>8} "
          + " ".join(f"{name:>16}" for name in present()))  # fmt: skip
    deadline, rows = math.inf, []
    for shape in QUICK_SHAPES if args.quick else ALL_SHAPES:
        if time.monotonic() > deadline:
            print(f"{shape} and what follows left out: {QUICK_SECONDS} s are over")
            break
        rows.append(bench_shape(shape, args.repeats))
        print_row(shape, rows[-1])
        if args.quick and len(rows) == 1:  # which has compiled everything
            deadline = time.monotonic() + QUICK_SECONDS
    for name in present():
        reasons = {row["kernels"][name].get("failed") for row in rows} - {None}
        for reason in reasons:
            print(f"{name} failed: {reason}")
    write_record(
        args.out,
        {
            "benchmark": "tree_attention",
            "block_size": BLOCK_SIZE,
            "left_out": left_out(),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
