"""How many nodes pay on this CPU: measured products of several rows against expected tokens.

A step of the target waits for its products; how much more several rows cost than one depends
on the processor, the dtype and the compiler at hand. A stack of matrices too large for the
caches is timed for each number of rows, with the products that serving will use: once per
machine, in a process of its own, because vLLM forks from the process that asks and OpenMP's
threads do not survive a fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional
from vllm import envs

from vllm_medusa import cpu_linear, cpu_rows
from vllm_medusa.vllm_seams import cpu_ops

# Numbers of rows that are timed; budgets between them cost no less than the next one.
ROWS = (1, 3, 4, 6, 9, 12, 18, 24)
ROUNDS = 5
# Beyond the last-level cache of any one socket's share; timed in tens of milliseconds.
STACK_BYTES = 192 << 20
# Of a plain step of SmolLM2-135M on two Zen 3 cores 74 % is products (23 of 31 ms); heads,
# verification and tree attention add 18 %.
PRODUCT_SHARE = 0.74
TREE_OVERHEAD = 0.18
# Answers to chat questions accept less than the long texts of calibration: depth 1 of the
# shipped heads' 8 best nodes 0.57 to 0.60 of the steps against 0.67.
SERVED_SHARE = 0.8
# Speculation must promise this much, or plain decoding is chosen.
LEAST_GAIN = 1.03
MEASURE_TIMEOUT_S = 180


def choose_budget(frequencies: Sequence[float], costs: dict[int, float]) -> tuple[int, float]:
    """Nodes that promise the most tokens a second, and their speed-up over plain decoding.

    Parameters
    ----------
    frequencies : sequence of float
        Share of the steps whose path holds each node, in the tree's order.
    costs : dict of int to float
        Rows -> time of the products, in those of plain vLLM's one row.

    Returns
    -------
    nodes : int
        0 where plain decoding is as fast.
    speedup : float

    Examples
    --------
    >>> choose_budget([0.5, 0.2, 0.1], {3: 1.0, 4: 1.5})
    (2, 1.3220338983050848)
    """
    best = (0, 1.0)
    for rows, cost in sorted(costs.items()):
        nodes = min(rows - 1, len(frequencies))
        tokens = 1 + SERVED_SHARE * sum(frequencies[:nodes])
        speedup = tokens / (PRODUCT_SHARE * cost + 1 - PRODUCT_SHARE + TREE_OVERHEAD)
        if nodes and speedup > best[1]:
            best = (nodes, speedup)
    return best if best[1] >= LEAST_GAIN else (0, best[1])


def machine_costs(hidden_size: int, dtype: torch.dtype) -> dict[int, float] | None:
    """:func:`measure_costs` for serving on this machine, from vLLM's cache folder if there.

    None where the measurement failed.
    """
    name = str(dtype).removeprefix("torch.")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    sources = (Path(__file__).read_text(), cpu_rows.SOURCE.read_text(), cpu_rows.processor())
    identity = json.dumps([hidden_size, name, threads, cores, cpu_rows.compiler(), *sources])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    record = Path(envs.VLLM_CACHE_ROOT) / "vllm_medusa" / f"costs-{digest}.json"
    if not record.exists():
        command = [sys.executable, "-P", "-m", __name__, str(hidden_size), name, str(record)]
        quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        try:
            subprocess.run(
                command, check=True, capture_output=True, timeout=MEASURE_TIMEOUT_S, env=quiet
            )
        except (OSError, subprocess.SubprocessError):
            return None
    return {int(rows): cost for rows, cost in json.loads(record.read_text()).items()}


def measure_costs(
    hidden_size: int, dtype: torch.dtype, kernels: cpu_rows.RowKernels | None
) -> dict[int, float]:
    """Time of a stack of products by number of rows, in units of plain vLLM's one row."""
    shape = (4 * hidden_size, hidden_size)
    size = shape[0] * shape[1] * dtype.itemsize
    weights = [torch.ones(shape, dtype=dtype) for _ in range(max(1, STACK_BYTES // size))]
    plain = [_stock_product(weight) for weight in weights]
    tree = plain
    if kernels is not None and cpu_rows.can_pack(weights[0]):
        panels = [cpu_rows.pack(weight) for weight in weights]
        tree = [_panel_product(kernels, panel) for panel in panels]
    times: dict[tuple[str, int], list[float]] = {}
    for number in range(ROUNDS + 1):
        for name, rows, products in [("plain", 1, plain), *(("tree", m, tree) for m in ROWS[1:])]:
            x = torch.ones(rows, hidden_size, dtype=dtype)
            start = time.perf_counter()
            for product in products:
                product(x)
            if number:  # the first round warms up
                times.setdefault((name, rows), []).append(time.perf_counter() - start)
    unit = statistics.median(times["plain", 1])
    return {m: statistics.median(times["tree", m]) / unit for m in ROWS[1:]}


def _stock_product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    ops = cpu_ops()
    try:
        handler = ops.create_onednn_mm(weight.t(), 32)
    except (AttributeError, RuntimeError):
        return lambda x: functional.linear(x, weight)
    return lambda x: ops.onednn_mm(handler, x, None)


def _panel_product(
    kernels: cpu_rows.RowKernels, panels: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: cpu_rows.product(kernels, x, panels)


def _main(hidden_size: str, dtype: str, record: str) -> None:
    costs = measure_costs(int(hidden_size), getattr(torch, dtype), cpu_linear.kernels())
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{record}.{os.getpid()}")
    draft.write_text(json.dumps(costs))
    draft.replace(record)


if __name__ == "__main__":
    _main(*sys.argv[1:])
