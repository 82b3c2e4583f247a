"""Ends processes that run an engine, with whatever the engine started."""

from __future__ import annotations

import contextlib
from multiprocessing.process import BaseProcess

import psutil

# What is left after its parent is gone gets this long to end by itself.
_ORPHANS_S = 5


def end_process(process: BaseProcess, patience_s: float) -> None:
    """Wait for a process to end, then end it, and everything that it leaves behind.

    A process that holds a vLLM engine waits for the engine core at its end, and the core has
    been seen to stay for good on a GPU, with the memory that it holds.

    Parameters
    ----------
    process : multiprocessing.process.BaseProcess
        Started, and told to end.
    patience_s : float
        Seconds that it may take.
    """
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    process.join(patience_s)
    if process.is_alive():
        process.kill()
        process.join()
    _, left = psutil.wait_procs(started, timeout=_ORPHANS_S)
    for orphan in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
