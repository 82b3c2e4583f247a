"""Processes that do not end by themselves, and what they leave behind."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time

import psutil
import pytest

from vllm_medusa.training.child_process import end_process

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


def start_and_leave(pipe, seconds: float) -> None:
    """Start a process that nobody ends, then end after so many seconds."""
    pipe.send(subprocess.Popen(SLEEP).pid)
    time.sleep(seconds)


@pytest.mark.parametrize(
    ("seconds", "patience"), [(300.0, 0.0), (2.0, 60.0)], ids=["hangs", "ends"]
)
def test_nothing_that_it_started_is_left(seconds, patience):
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=start_and_leave, args=(theirs, seconds))
    process.start()
    child = psutil.Process(mine.recv())
    end_process(process, patience)
    assert process.exitcode == (0 if patience else -9)
    child.wait(30)
    assert not child.is_running()


def test_a_process_that_ends_is_left_alone():
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=time.sleep, args=(0.1,))
    process.start()
    end_process(process, 60.0)
    assert process.exitcode == 0
