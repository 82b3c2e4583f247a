"""How many nodes pay right now: what a step costs against the tokens that it brings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from vllm_medusa.served_costs import ServedCosts

# Calibration's answers and the served ones differ. Shipped heads, MT-Bench: depth 1 is
# accepted in 0.9 of the calibrated share.
PRIOR_SHARE = 0.9
# The prior counts as much as this many steps of one request, and so does what the other widths
# tell about a width.
PRIOR_STEPS = 64
# What is chosen at every step, histories taken in, accepts more of calibration's promise the wider
# it is. Shipped heads, 8B shape, MT-Bench: 1.19, 1.29, 1.28 and 1.43 of it with 3, 7, 15 to 31 and
# 63 nodes, which is about this much and this much more for every doubling of the rows.
LOOKUP_SHARE = 1.12
LOOKUP_SHARE_OF_DOUBLING = 0.05
# A step's evidence halves after about 1400 request-steps: some seconds of a busy server.
DECAY = 1 - 1 / 2048
# Kept at every look at the prices, 32 steps apart.
RELAXATION = 0.99
# Another budget must promise this much more to be worth a change of graphs.
HYSTERESIS = 1.01
# A width that was not tried lately is taken to accept up to this much more than is known of it,
# so that it is tried where it may be best: the shape of what is accepted over the widths is not
# the calibrated one where prompt lookup proposes too.
OPTIMISM = 0.2
# And its step to take this much less than was measured at start, while it has not been served.
TIME_OPTIMISM = 0.15
# One look in so many is bold: a width of which nothing is known is taken to accept up to twice
# what is expected, or nothing would ever be learnt where plain decoding seems best.
BOLD_LOOKS = 200
BOLDNESS = 1.0


class Evidence:
    """Steps of one width and the tokens that they accepted, the older the lighter."""

    def __init__(self) -> None:
        self.steps = self.accepted = 0.0

    def add(self, accepted: int) -> None:
        """One more step."""
        self.steps = DECAY * self.steps + 1
        self.accepted = DECAY * self.accepted + accepted

    def relax(self) -> None:
        """Forget a little."""
        self.steps *= RELAXATION
        self.accepted *= RELAXATION

    @property
    def weight(self) -> float:
        """Against the prior, 0 to 1."""
        return self.steps / (self.steps + PRIOR_STEPS)


class NodeBudget:
    """Chooses the nodes of a step for which tokens per second are highest.

    What a step of a width accepts is estimated from that width's own steps, from the share of
    calibration's promises that near widths kept, and from a prior, in this order of weight.  A
    share may be more than 1: a request's history proposes too where prompt lookup is on.

    Parameters
    ----------
    frequencies : sequence of float
        Share of steps whose accepted path holds each node, best first (``tree.json``).
    choices : sequence of int
        Node counts for which the engine has graphs; 0 is plain decoding.
    costs : ServedCosts
    depths : sequence of int, optional
        Number of nodes -> most tokens that they can have accepted; without it all of them.
    lookup : bool, optional
        Whether requests' histories propose too.

    Examples
    --------
    >>> costs = StepCosts({(1, 1, 0): 1.0, (2, 1, 0): 1.2, (1, 8, 0): 1.0, (2, 8, 0): 2.0})
    >>> budget = NodeBudget([0.7], [0, 1], ServedCosts(costs))
    >>> budget.choose(1, 0), budget.choose(8, 0)
    (1, 0)
    """

    def __init__(
        self,
        frequencies: Sequence[float],
        choices: Sequence[int],
        costs: ServedCosts,
        depths: Sequence[int] | None = None,
        lookup: bool = False,
    ):
        self.costs = costs
        # nodes -> accepted tokens of a step that calibration promised
        self.promised = [0.0, *itertools.accumulate(frequencies)]
        if lookup:
            self.promised = [
                promised * (LOOKUP_SHARE + LOOKUP_SHARE_OF_DOUBLING * math.log2(nodes + 1))
                for nodes, promised in enumerate(self.promised)
            ]
        self.choices = sorted(n for n in set(choices) if n < len(self.promised))
        self.depths = range(len(self.promised)) if depths is None else depths
        self._evidence: dict[int, Evidence] = {}

    @property
    def share(self) -> float:
        """Of the promised accepted tokens, those that came; over all widths."""
        return self._share(dict.fromkeys(self._evidence, 1.0))

    def _share(self, weights: dict[int, float]) -> float:
        accepted, expected = PRIOR_SHARE * PRIOR_STEPS, float(PRIOR_STEPS)
        for nodes, weight in weights.items():
            own = self._evidence[nodes]
            accepted += weight * own.accepted
            expected += weight * own.steps * self.promised[nodes]
        return accepted / expected

    def accepted(self, nodes: int) -> float:
        """Tokens that a request's step accepts of so many nodes, as far as is known."""
        if nodes == 0:
            return 0.0
        # A width of twice or half the rows counts half.
        near = {
            other: min(nodes + 1, other + 1) / max(nodes + 1, other + 1) for other in self._evidence
        }
        told = self._share(near) * self.promised[nodes]
        own = self._evidence.get(nodes)
        if own is not None:
            told += own.weight * (own.accepted / own.steps - told) if own.steps > 0 else 0.0
        return min(told, float(self.depths[nodes]))

    def observe(self, nodes: int, accepted: int) -> None:
        """Learn from one request's step: nodes verified, tokens accepted beside the root's."""
        if 0 < nodes < len(self.promised):
            self._evidence.setdefault(nodes, Evidence()).add(accepted)

    def relax(self) -> None:
        """Forget a little: plain steps bring no evidence, so a tree is tried again at last.

        Without evidence the prior weighs as much again after some 380 calls.
        """
        self.costs.relax()
        for own in self._evidence.values():
            own.relax()

    def rate(
        self,
        nodes: int,
        requests: int,
        context: float,
        optimism: float = 0.0,
        time_optimism: float = 0.0,
    ) -> float | None:
        """Tokens per second of one request; None where the step was not measured.

        Parameters
        ----------
        nodes, requests : int
        context : float
            Keys of a request.
        optimism, time_optimism : float
            Shares by which more is accepted, and by which a step takes less, than is known.

        Returns
        -------
        float or None
        """
        seconds = self.costs.of(nodes + 1, requests, context)
        if seconds is None:
            return None
        accepted = (1 + optimism) * self.accepted(nodes)
        return (1 + accepted) / ((1 - time_optimism) * seconds)

    def choose(
        self, requests: int, context: float, current: int | None = None, bold: bool = False
    ) -> int | None:
        """Nodes for each of ``requests`` requests with ``context`` keys on average.

        None where nothing was measured for a batch of this size.
        """
        known = {n: own.weight for n, own in self._evidence.items()}
        timed = {n: self.costs.weight(n + 1, requests) for n in self.choices}
        # Nothing is known of any width at the start: no reason to prefer one.
        most = 1.0 if bold else max(known.values(), default=0.0)
        most_timed = max(timed.values(), default=0.0)
        rates = {}
        for nodes in self.choices:
            optimism = (BOLDNESS if bold else OPTIMISM) * (most - known.get(nodes, 0.0))
            time_optimism = TIME_OPTIMISM * (most_timed - timed[nodes])
            rate = self.rate(nodes, requests, context, optimism, time_optimism)
            if rate is not None:
                rates[nodes] = rate
        if not rates:
            return None
        best = max(rates, key=lambda n: rates[n])
        # Plain decoding need not be better by a margin: no tree may stay that loses to it.
        if current in rates and best != 0 and rates[best] < HYSTERESIS * rates[current]:
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
        self._looks = 0
        self._nodes = list(fixed)
        self._is_priced = [False] * len(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, requests: int) -> int:
        if not self._is_priced[requests]:
            bold = self._looks % BOLD_LOOKS == BOLD_LOOKS - 1
            chosen = self.budget.choose(requests, self.context, self._nodes[requests], bold)
            if chosen is not None:
                self._nodes[requests] = chosen
            self._is_priced[requests] = True
        return self._nodes[requests]

    def look_again(self, context: float) -> None:
        """Forget prices; ``context`` is the running requests' mean, in tokens."""
        self.context = context
        self._looks += 1
        self.budget.relax()
        self._is_priced = [False] * len(self._nodes)
