"""Times a runner's decode steps on dummy batches, once after its CUDA graphs are there."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_medusa.step_costs import StepCosts

logger = init_logger(f"vllm.{__name__}")

# The median of so many steps: a host that is busy with another engine's start delays one. What is
# still wrong then is mended in service (:mod:`vllm_medusa.served_costs`).
WARMUP, STEPS = 1, 3
CONTEXTS = (256, 8192)
# Of a batch, where no graphs are captured.
MOST_ROWS = 512


def measure_steps(runner: Any) -> StepCosts:
    """Time one decode step for every row count, for batches of 1, 2, 4, ... requests.

    All ranks of a model must call it together: the steps hold their collectives.

    Parameters
    ----------
    runner : TreeRunnerMixin
        With KV cache and graphs.
    """
    began = time.perf_counter()
    # Wider batches have no graph of their own and never pay where others do.
    captured = runner.compilation_config.max_cudagraph_capture_size
    most = min(captured or MOST_ROWS, runner.max_num_tokens)
    longest = runner.max_model_len
    seconds = {}
    # Plain decoding is a choice even where the schedule never comes to it.
    for rows in sorted({1, *runner.tree_batch.row_counts}):
        requests = 1
        while requests <= runner.max_num_reqs and requests * rows <= most:
            for context in CONTEXTS:
                context = min(context, longest - rows)
                if (rows, requests, context) not in seconds:
                    seconds[rows, requests, context] = _time_step(runner, rows, requests, context)
            requests *= 2
    logger.info(
        "Medusa: timed %d decode steps in %.1f s", len(seconds), time.perf_counter() - began
    )
    return StepCosts(seconds)


def _time_step(runner: Any, rows: int, requests: int, context: int) -> float:
    """Seconds of a step when one follows the other, as async scheduling runs them.

    The host prepares a step while the device computes the one before, so the slower of the
    two is what counts.
    """
    is_cuda = runner.device.type == "cuda"
    marks = []
    for _ in range(WARMUP + STEPS):
        _dummy_step(runner, rows, requests, context)
        # On the device's own time: the first step has nothing to hide its launches behind.
        marks.append(_recorded_event() if is_cuda else time.perf_counter())
    pairs = itertools.pairwise(marks[WARMUP - 1 :])
    if is_cuda:
        torch.cuda.synchronize()
        return statistics.median(1e-3 * a.elapsed_time(b) for a, b in pairs)
    return statistics.median(b - a for a, b in pairs)


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _dummy_step(runner: Any, rows: int, requests: int, context: int) -> None:
    """Forward pass, lm_head, draw, walk and drafts of a dummy batch; no request changes."""
    batch = SchedulerOutput.make_empty()
    batch.num_scheduled_tokens = {f"_dummy_req_{i}": rows for i in range(requests)}
    batch.total_num_scheduled_tokens = rows * requests
    runner.execute_model(batch, dummy_run=True, context_len=context)
    state, runner.execute_model_state = runner.execute_model_state, None
    if state is None or runner.verification_step is None:
        return
    # Without a graph for the rest its lm_head stands for it.
    if not runner.verification_step.replay_dummy(requests, rows):
        runner.model.compute_logits(state.hidden_states[: requests * rows])
