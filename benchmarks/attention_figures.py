"""What a call of tree attention takes of a multiprocessor, moves and reaches, without a profiler.

For bench_tree_attention.py.  A profiler's counters are in the record of profile_kernels.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timing import capture, time_in_turns

from vllm_medusa.triton_kernels.attention_plan import SHARED_BYTES

# Of a multiprocessor of compute capability 9.0; a program takes 1 KiB of shared memory beside
# its own, and registers by the 256 of a warp.
REGISTERS, WARPS, PROGRAMS = 64 << 10, 64, 32
COPIED_BYTES = 1 << 30
PRODUCT_SIZE = 8192


def measured_rates() -> dict[str, float]:
    """Bytes a second (read and written) of a large copy, FLOP a second of a large product."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    size = (PRODUCT_SIZE, PRODUCT_SIZE)
    left, right = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    graphs = [
        capture(lambda: target.copy_(source)),
        capture(lambda: torch.mm(left, right, out=product)),
    ]
    copy, multiply = time_in_turns([graph.replay for graph in graphs], repeats=10, cold_l2=False)
    return {
        "copy_bytes_per_s": 2 * COPIED_BYTES / copy.median * 1e6,
        "product_flop_per_s": 2 * PRODUCT_SIZE**3 / multiply.median * 1e6,
    }


def resources(kernel: Any, programs: int) -> dict[str, Any]:
    """A compiled kernel's registers, spilled bytes and shared memory, and what they allow."""
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    per_warp = math.ceil(kernel.n_regs * 32 / 256) * 256
    resident = min(
        REGISTERS // (per_warp * warps), SHARED_BYTES // (shared + 1024), WARPS // warps, PROGRAMS
    )
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    return {
        "name": kernel.metadata.name, "programs": programs, "warps": warps,
        "registers": kernel.n_regs, "spilled": kernel.n_spills, "shared_bytes": shared,
        "resident": resident, "occupancy_percent": round(100 * resident * warps / WARPS, 1),
        "waves": round(programs / (multiprocessors * resident), 2),
    }  # fmt: skip


def reached(
    median_us: float, start_us: float, num_bytes: float, flop: float, rates: dict[str, float]
) -> dict[str, float]:
    """Rates of a call and their share of a copy's and of a product's.

    Bytes are those that it has to read and write: what splits leave for their join is not.
    ``roofline_percent`` is the share of the larger of both times in the measured one,
    ``roofline_percent_without_start`` in what is left of it without the start of a graph.
    """
    seconds = median_us / 1e6
    least = max(num_bytes / rates["copy_bytes_per_s"], flop / rates["product_flop_per_s"])
    return {
        "bytes": num_bytes,
        "flop": flop,
        "gb_per_s": round(num_bytes / seconds / 1e9, 1),
        "tflop_per_s": round(flop / seconds / 1e12, 1),
        "copy_percent": round(100 * num_bytes / seconds / rates["copy_bytes_per_s"], 1),
        "product_percent": round(100 * flop / seconds / rates["product_flop_per_s"], 1),
        "roofline_percent": round(100 * least / seconds, 1),
        "roofline_percent_without_start": round(100 * least / (seconds - start_us / 1e6), 1),
    }
