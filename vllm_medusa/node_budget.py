"""How many nodes pay right now: what a step costs against the tokens that it brings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vllm_medusa.step_costs import StepCosts

# Calibration's answers and the served ones differ. Shipped heads, MT-Bench: depth 1 is
# accepted in 0.9 of the calibrated share.
PRIOR_SHARE = 0.9
# The prior counts as much as this many steps of one request.
PRIOR_STEPS = 64
# A step's evidence halves after about 1400 request-steps: some seconds of a busy server.
DECAY = 1 - 1 / 2048
# Kept at every look at the prices, 64 steps apart.
RELAXATION = 0.98
# Another budget must promise this much more to be worth a change of graphs.
HYSTERESIS = 1.01


class NodeBudget:
    """Chooses the nodes of a step for which tokens per second are highest.

    The tokens are those that calibration promised for a tree of that many nodes, times the
    share of its promises that served requests kept lately.

    Parameters
    ----------
    frequencies : sequence of float
        Share of steps whose accepted path holds each node, best first (``tree.json``).
    choices : sequence of int
        Node counts for which the engine has graphs; 0 is plain decoding.
    costs : StepCosts

    Examples
    --------
    >>> costs = StepCosts({(1, 1, 0): 1.0, (2, 1, 0): 1.2, (1, 8, 0): 1.0, (2, 8, 0): 2.0})
    >>> budget = NodeBudget([0.7], [0, 1], costs)
    >>> budget.choose(1, 0), budget.choose(8, 0)
    (1, 0)
    """

    def __init__(self, frequencies: Sequence[float], choices: Sequence[int], costs: StepCosts):
        self.costs = costs
        # nodes -> accepted tokens of a step that calibration promised
        self.promised = [0.0, *itertools.accumulate(frequencies)]
        self.choices = sorted(n for n in set(choices) if n < len(self.promised))
        self._accepted = PRIOR_SHARE * PRIOR_STEPS
        self._expected = float(PRIOR_STEPS)

    @property
    def share(self) -> float:
        """Of the promised accepted tokens, those that came."""
        return self._accepted / self._expected

    def observe(self, nodes: int, accepted: int) -> None:
        """Learn from one request's step: nodes verified, tokens accepted beside the root's."""
        if 0 < nodes < len(self.promised):
            self._accepted = DECAY * self._accepted + accepted
            self._expected = DECAY * self._expected + self.promised[nodes]

    def relax(self) -> None:
        """Forget a little: plain steps bring no evidence, so a tree is tried again at last.

        Without evidence the prior weighs as much again after some 190 calls.
        """
        self._accepted += (1 - RELAXATION) * (PRIOR_SHARE * PRIOR_STEPS - self._accepted)
        self._expected += (1 - RELAXATION) * (PRIOR_STEPS - self._expected)

    def rate(self, nodes: int, requests: int, context: float) -> float | None:
        """Tokens per second of one request; None where the step was not measured."""
        seconds = self.costs.of(nodes + 1, requests, context)
        return None if seconds is None else (1 + self.share * self.promised[nodes]) / seconds

    def choose(self, requests: int, context: float, current: int | None = None) -> int | None:
        """Nodes for each of ``requests`` requests with ``context`` keys on average.

        None where nothing was measured for a batch of this size.
        """
        rates = {n: self.rate(n, requests, context) for n in self.choices}
        rates = {n: rate for n, rate in rates.items() if rate is not None}
        if not rates:
            return None
        best = max(rates, key=lambda n: rates[n])
        if current in rates and rates[best] < HYSTERESIS * rates[current]:
            return current
        return best


class PricedLookup:
    """vLLM's lookup ``batch size -> nodes``, filled as batches come and priced anew at times.

    Parameters
    ----------
    budget : NodeBudget
    fixed : sequence of int
        vLLM's own; batches that were not measured keep its nodes.
    """

    def __init__(self, budget: NodeBudget, fixed: Sequence[int]):
        self.budget = budget
        self.context = 0.0
        self._nodes = list(fixed)
        self._is_priced = [False] * len(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, requests: int) -> int:
        if not self._is_priced[requests]:
            chosen = self.budget.choose(requests, self.context, self._nodes[requests])
            if chosen is not None:
                self._nodes[requests] = chosen
            self._is_priced[requests] = True
        return self._nodes[requests]

    def look_again(self, context: float) -> None:
        """Forget prices; ``context`` is the running requests' mean, in tokens."""
        self.context = context
        self.budget.relax()
        self._is_priced = [False] * len(self._nodes)
