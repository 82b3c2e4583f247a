"""What several rows cost on this machine: products timed once, by number of rows.

A step of the target waits for its products; how much more several rows cost than one depends
on the processor, the dtype and the compiler at hand. A stack of matrices too large for the
caches is timed for each number of rows, with vLLM's products and with those that serve
trees: once per machine, in a process of its own, because vLLM forks from the process that asks
and OpenMP's threads do not survive a fork. Ten seconds, of which importing takes seven.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from vllm_medusa import cpu_rows, cpu_seams

TREE_ROWS = (1, 2, 3, 4, 6, 9, 12, 18, 24, 36, 48)
PLAIN_ROWS = (1, 2, 4, 8, 16, 32)
ROUNDS = 5
# Beyond the last-level cache of any one socket's share; timed in tens of milliseconds.
STACK_BYTES = 192 << 20
MEASURE_TIMEOUT_S = 60
# Further apart than this in the wrong order, two timings tell of other work on the machine.
MOST_DISORDER = 1.5


class RowCosts(NamedTuple):
    """Rows -> time of the products, in those of plain vLLM's one row."""

    plain: dict[int, float]
    tree: dict[int, float]


def machine_costs(
    folder: Path, hidden_size: int, dtype: torch.dtype, stored: torch.dtype
) -> RowCosts | None:
    """:func:`measure_costs` on this machine, from ``folder`` if they are there.

    Parameters
    ----------
    folder : pathlib.Path
        Keeps the record and the compiled kernels.
    hidden_size : int
        Input features of the matrices.
    dtype : torch.dtype
        That the model computes in.
    stored : torch.dtype
        Of the checkpoint's weights.

    Returns
    -------
    RowCosts or None
        None where the measurement failed, or where the machine was too busy for one; then
        nothing is kept and the next start tries again.
    """
    names = [str(d).removeprefix("torch.") for d in (dtype, stored)]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    sources = (Path(__file__).read_text(), cpu_rows.SOURCE.read_text(), cpu_rows.processor())
    identity = json.dumps([hidden_size, names, threads, cores, cpu_rows.compiler(), *sources])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    record = folder / f"costs-{digest}.json"
    if not record.exists():
        command = [sys.executable, "-P", "-m", __name__, str(record), str(hidden_size), *names]
        try:
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                timeout=MEASURE_TIMEOUT_S,
                env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
            )
        except (OSError, subprocess.SubprocessError):
            return None
    plain, tree = json.loads(record.read_text())
    return RowCosts(*({int(m): cost for m, cost in part.items()} for part in (plain, tree)))


def measure_costs(
    hidden_size: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    kernels: cpu_rows.RowKernels | None,
) -> RowCosts:
    """Time a stack of products by number of rows; the best of a few rounds, side by side.

    Raises
    ------
    ValueError
        When the timings contradict each other.
    """
    shape = (4 * hidden_size, hidden_size)
    count = max(1, STACK_BYTES // (shape[0] * shape[1] * dtype.itemsize))
    # A third has all the digits of its dtype.
    weights = [torch.full(shape, 1 / 3, dtype=stored).to(dtype) for _ in range(count)]
    plain = [_stock_product(weight) for weight in weights]
    tree = plain
    if kernels is not None and cpu_rows.can_pack(weights[0]):
        tree = [_row_product(kernels, cpu_rows.pack(weight)) for weight in weights]
    runs = [(plain, rows) for rows in PLAIN_ROWS] + [(tree, rows) for rows in TREE_ROWS]
    best = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for index, (products, rows) in enumerate(runs):
            x = torch.ones(rows, hidden_size, dtype=dtype)
            start = time.perf_counter()
            for product in products:
                product(x)
            best[index] = min(best[index], time.perf_counter() - start)
    plain_best = in_order(dict(zip(PLAIN_ROWS, best, strict=False)))
    tree_best = in_order(dict(zip(TREE_ROWS, best[len(PLAIN_ROWS) :], strict=True)))
    unit = plain_best[1]
    return RowCosts(*({m: s / unit for m, s in part.items()} for part in (plain_best, tree_best)))


def in_order(times: dict[int, float]) -> dict[int, float]:
    """Timings by ascending rows in which fewer rows never cost more, as they could be padded.

    Raises
    ------
    ValueError
        When they are further out of order than noise puts them.

    Examples
    --------
    >>> in_order({1: 2.2, 2: 2.0, 6: 3.0})
    {1: 2.0, 2: 2.0, 6: 3.0}
    """
    ordered, least = {}, float("inf")
    for rows, seconds in sorted(times.items(), reverse=True):
        if seconds > MOST_DISORDER * least:
            raise ValueError(
                f"{rows} rows took {seconds / least:.1f} times as long as more of them: the "
                "machine is too busy to measure products"
            )
        least = ordered[rows] = min(least, seconds)
    return dict(sorted(ordered.items()))


def _stock_product(weight: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    owner = cpu_seams.make_onednn_product(weight)
    if owner is None:
        return lambda x: functional.linear(x, weight)

    def product(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        cpu_seams.onednn_product(out, x, None, owner.handler_tensor)
        return out

    return product


def _row_product(
    kernels: cpu_rows.RowKernels, panels: torch.Tensor
) -> Callable[[torch.Tensor], Any]:
    return lambda x: cpu_rows.product(kernels, x, panels)


def _main(record: str, hidden_size: str, dtype: str, stored: str) -> None:
    target = Path(record)
    try:
        kernels = cpu_rows.load(target.parent)
    except OSError:  # the worker says why
        kernels = None
    costs = measure_costs(int(hidden_size), getattr(torch, dtype), getattr(torch, stored), kernels)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(f"{record}.{os.getpid()}")
    draft.write_text(json.dumps(costs))
    draft.replace(target)


if __name__ == "__main__":
    _main(*sys.argv[1:])
