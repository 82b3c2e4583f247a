"""Means of what was seen while serving, the older the lighter."""

from __future__ import annotations

# Kept at every look at the prices of steps, 32 steps apart.
RELAXATION = 0.99


class DecayedMean:
    """A mean and how much it rests on.

    Parameters
    ----------
    decay : float
        Share of the older that each step leaves.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.steps = self.sum = 0.0

    def add(self, value: float, steps: float = 1.0) -> None:
        """See a value that counts for so many steps."""
        kept = self._decay**steps
        self.steps = kept * self.steps + steps
        self.sum = kept * self.sum + steps * value

    def relax(self) -> None:
        """Forget a little."""
        self.steps *= RELAXATION
        self.sum *= RELAXATION

    def weight(self, prior_steps: float) -> float:
        """Against a prior that counts as so many steps, 0 to 1."""
        return self.steps / (self.steps + prior_steps)
