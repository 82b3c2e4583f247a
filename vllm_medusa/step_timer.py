"""Times a runner's decode steps on dummy batches, once after its CUDA graphs are there."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_medusa.step_costs import StepCosts

logger = init_logger(f"vllm.{__name__}")

# The best of so many pairs of steps: another process on the GPU only ever makes them slower.
WARMUP, REPEATS, PAIR = 2, 3, 2
CONTEXTS = (256, 8192)
# Steps of more rows are beyond what graphs are captured for by default.
MOST_ROWS = 1024


def measure_steps(runner: Any) -> StepCosts:
    """Time one decode step for every row count, for batches of 1, 2, 4, ... requests.

    All ranks of a model must call it together: the steps hold their collectives.

    Parameters
    ----------
    runner : TreeRunnerMixin
        With KV cache and graphs.
    """
    began = time.perf_counter()
    most = min(MOST_ROWS, runner.max_num_tokens)
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

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            _dummy_step(runner, rows, requests, context)
        if runner.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run(WARMUP)
    return min(run(PAIR) for _ in range(REPEATS)) / PAIR


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
