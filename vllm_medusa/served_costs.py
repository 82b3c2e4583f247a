"""Corrects what steps cost at start by what they take while the engine serves."""

from __future__ import annotations

import time
from collections.abc import Iterable

from vllm_medusa.decayed_mean import DecayedMean
from vllm_medusa.step_costs import StepCosts

# Measured at start, a width's time counts as much as this many of its steps in service. Steps of
# one kind take the same within a few per cent; one that starts late does not decide anything.
PRIOR_STEPS = 16
# A width's evidence halves after about 350 of its steps: some seconds.
DECAY = 1 - 1 / 512
# Beyond, something else than the step took the time.
LEAST_RATIO, MOST_RATIO = 0.5, 3.0


class StepClock:
    """Time of a step, from the output of one to that of the next.

    While a step runs the next one is prepared, so that outputs follow each other as steps do.
    """

    def __init__(self) -> None:
        self._last: float | None = None

    def tick(self, now: float | None = None) -> float | None:
        """Seconds of the step that has just ended; None for the first, and after :meth:`stop`.

        Parameters
        ----------
        now : float, optional
            Seconds of a monotonic clock.
        """
        now = time.perf_counter() if now is None else now
        last, self._last = self._last, now
        return None if last is None else now - last

    def stop(self) -> None:
        """Nothing runs: the time until the next output is no step's."""
        self._last = None


class ServedCosts:
    """Seconds of steps: those measured at start, times what those of this width came to since.

    Dummy steps of an engine that starts are not those that it serves: their host has less to do,
    or another engine starts beside it.  Nor have they a prompt in them: at 256 requests every step
    of a busy server has one, and takes 1.8 times as long under trees where a plain one takes 1.4
    times.  One factor for each width and doubling of the batch; a width that has not run takes the
    mean of those that have, since what slows one slows the others.

    Parameters
    ----------
    measured : StepCosts
        At start.

    Examples
    --------
    >>> costs = ServedCosts(StepCosts({(1, 1, 0): 1.0, (4, 1, 0): 2.0}))
    >>> for _ in range(2000):
    ...     costs.observe(4, 1, 0, 3.0)
    >>> round(costs.of(4, 1, 0), 1), round(costs.of(1, 1, 0), 1)
    (3.0, 1.5)
    """

    def __init__(self, measured: StepCosts):
        self.measured = measured
        # Doubling of the batch -> rows -> ratio of its steps
        self._seen: dict[int, dict[int, DecayedMean]] = {}

    def observe(self, rows: int, requests: int, context: float, seconds: float) -> None:
        """Learn from one step."""
        expected = self.measured.of(rows, requests, context)
        if expected is None:
            return
        ratio = min(max(seconds / expected, LEAST_RATIO), MOST_RATIO)
        seen = self._seen.setdefault(requests.bit_length(), {})
        seen.setdefault(rows, DecayedMean(DECAY)).add(ratio)

    def of(self, rows: int, requests: int, context: float) -> float | None:
        """Seconds of a step; None where none of this kind was measured at start."""
        seconds = self.measured.of(rows, requests, context)
        if seconds is None:
            return None
        seen = self._seen.get(requests.bit_length(), {})
        common = _mean(seen.values(), 1.0)
        return seconds * _mean([seen[rows]], common) if rows in seen else seconds * common

    def weight(self, rows: int, requests: int) -> float:
        """How much of what is said of a step is known from service, 0 to 1."""
        seen = self._seen.get(requests.bit_length(), {})
        return seen[rows].weight(PRIOR_STEPS) if rows in seen else 0.0

    def relax(self) -> None:
        """Forget a little: a width that does not run may take another time by now."""
        for widths in self._seen.values():
            for ratio in widths.values():
                ratio.relax()


def _mean(ratios: Iterable[DecayedMean], prior: float) -> float:
    """Of all their steps, the prior taken in."""
    steps, total = PRIOR_STEPS, PRIOR_STEPS * prior
    for ratio in ratios:
        steps += ratio.steps
        total += ratio.sum
    return total / steps
