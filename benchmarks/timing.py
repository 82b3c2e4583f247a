"""GPU time of a function: warmed up, L2 flushed before every run, replayed from a CUDA graph."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

BANDWIDTH = 3.0e12  # bytes/s, an H100's measured rate
PRODUCT_RATE = 800e12  # FLOP/s of large bf16 products, measured there too


@dataclass(frozen=True)
class Timing:
    """Microseconds of `count` runs."""

    median: float
    p10: float
    p90: float
    minimum: float
    count: int

    def as_dict(self) -> dict[str, float]:
        return {key: round(value, 2) for key, value in asdict(self).items()}


def _flush_buffer() -> torch.Tensor:
    """Twice the L2, and large enough (64 MiB) for its write to hide the launch that follows."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.uint8, device="cuda")


def capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call, which has been made before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, allocates
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def time_gpu(
    function: Callable[[], object],
    *,
    repeats: int = 50,
    warmup: int = 5,
    cold_l2: bool = True,
    use_graph: bool = True,
) -> Timing:
    """Time one call of `function` on the current device.

    Parameters
    ----------
    function : callable
        Launches the work; must be capturable when `use_graph` is set.
    repeats, warmup : int
        Timed and untimed runs.
    cold_l2 : bool
        Overwrite the L2 cache before every run: in a model, the layers in between do.
    use_graph : bool
        Replay a captured graph, as serving does, so that the host's launch time is left out.

    Returns
    -------
    Timing
        Event times in microseconds.  The events enclose the run but not the flush; a replayed
        graph adds one to two microseconds of its own start.
    """
    run = capture(function).replay if use_graph else function
    return time_in_turns([run], repeats=repeats, warmup=warmup, cold_l2=cold_l2)[0]


def time_in_turns(
    runs: list[Callable[[], object]], *, repeats: int, warmup: int = 5, cold_l2: bool = True
) -> list[Timing]:
    """Time functions as `time_gpu` does, one call of each a round: clocks drift for all alike."""
    buffer = _flush_buffer() if cold_l2 else None
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for index in range(warmup + repeats):
        for run, pairs in zip(runs, events, strict=True):
            if buffer is not None:
                buffer.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            if index >= warmup:
                pairs.append((start, end))
    torch.cuda.synchronize()
    return [_timing([start.elapsed_time(end) * 1e3 for start, end in pairs]) for pairs in events]


def _timing(microseconds: list[float]) -> Timing:
    times = sorted(microseconds)
    last = len(times) - 1
    return Timing(
        median=statistics.median(times), p10=times[last // 10], p90=times[last * 9 // 10],
        minimum=times[0], count=len(times),
    )  # fmt: skip


def start_us(repeats: int = 40) -> float:
    """Median of a kernel that does next to nothing: what every time here contains."""
    number = torch.zeros(1, device="cuda")
    return time_gpu(lambda: number.add_(1), repeats=repeats).median


def kernel_benchmark_parser(description: str, quick: str) -> argparse.ArgumentParser:
    """Options of every kernel benchmark; ``quick`` says what ``--quick`` leaves."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--repeats", type=int, default=40)
    return parser


def sweep_parser(description: str, *, seconds: int, processes: int) -> argparse.ArgumentParser:
    """Options of benchmarks that compile in many processes first and then end in time."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=seconds, help="when to leave the rest out")
    parser.add_argument("--processes", type=int, default=processes, help="that compile")
    return parser


def compile_in_pool(compile_one: Callable[[Any], None], work: Iterable, processes: int) -> None:
    """Fill Triton's cache: one call for each piece of work, in so many processes."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            list(pool.map(compile_one, work))
    except BrokenProcessPool as problem:  # what is missing is compiled where it is timed
        print(problem, flush=True)


def reason_of(problem: Exception) -> str:
    """An exception's first line."""
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]


def parse_on_gpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; without a CUDA device an error."""
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    return args
