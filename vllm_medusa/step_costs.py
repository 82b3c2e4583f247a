"""What a decode step costs on this machine: by requests, rows and context, measured at start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class StepCosts:
    """Seconds of decode steps in which every request has the same number of rows.

    Attributes
    ----------
    seconds : mapping
        ``(rows, requests, context) -> seconds``; ``rows`` is 1 for plain decoding, else the
        tree's nodes and its root. Each pair of rows and requests is there with every context.
    """

    seconds: Mapping[tuple[int, int, int], float]

    def of(self, rows: int, requests: int, context: float) -> float | None:
        """Seconds of a step, linear between what was measured and beyond the longest context.

        None where rows were not measured or the batch is larger than any that was: no CUDA
        graph covers it.

        Examples
        --------
        >>> costs = StepCosts({(4, 1, 0): 1.0, (4, 1, 100): 2.0, (4, 3, 0): 3.0, (4, 3, 100): 4.0})
        >>> costs.of(4, 2, 50), costs.of(4, 1, 300), costs.of(4, 4, 0)
        (2.5, 4.0, None)
        """
        sizes = self._sizes.get(rows, ())
        above = next((size for size in sizes if size >= requests), None)
        if above is None:
            return None
        below = max((size for size in sizes if size <= requests), default=above)
        low, high = (self._at_context(rows, size, context) for size in (below, above))
        share = 0.0 if above == below else (requests - below) / (above - below)
        return low + share * (high - low)

    @cached_property
    def _sizes(self) -> dict[int, list[int]]:
        """Rows -> measured batch sizes, ascending."""
        return {rows: sorted({m for n, m in self._known if n == rows}) for rows, _ in self._known}

    @cached_property
    def _known(self) -> dict[tuple[int, int], list[tuple[int, float]]]:
        """(rows, requests) -> (context, seconds), ascending."""
        known: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for rows, requests, context in sorted(self.seconds):
            entry = (context, self.seconds[rows, requests, context])
            known.setdefault((rows, requests), []).append(entry)
        return known

    def _at_context(self, rows: int, requests: int, context: float) -> float:
        known = self._known[rows, requests]
        # The pair around it, or the last pair; below the first it costs what the first does,
        # since there weights and launches are the price and a slope would be noise.
        end = next((i for i, (c, _) in enumerate(known) if c >= context), len(known) - 1)
        if end == 0:
            return known[0][1]
        (c0, t0), (c1, t1) = known[end - 1], known[end]
        return t0 + (context - c0) / (c1 - c0) * max(0.0, t1 - t0)

    def save(self, path: Path) -> None:
        """Write as JSON, at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps([[*key, value] for key, value in self.seconds.items()]))
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> StepCosts:
        """Read what :meth:`save` wrote."""
        return cls({(n, m, c): t for n, m, c, t in json.loads(path.read_text())})
