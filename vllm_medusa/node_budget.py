"""How many nodes pay right now: what a step costs against the tokens that it brings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from vllm_medusa.decayed_mean import RELAXATION, DecayedMean
from vllm_medusa.served_costs import ServedCosts

# Calibration's answers and the served ones differ. Shipped heads, MT-Bench: depth 1 is
# accepted in 0.9 of the calibrated share.
PRIOR_LEVEL = 0.9
# The prior counts as much as this many steps of one request, and so does what the other widths
# tell about a width.
PRIOR_STEPS = 128
# What is chosen at every step, histories taken in, accepts more of calibration's promise the wider
# it is. Shipped heads, 8B shape, MT-Bench: 1.19, 1.29, 1.28 and 1.43 of it with 3, 7, 15 to 31 and
# 63 nodes, which is about this much and this much more for every doubling of the rows.
LOOKUP_SHARE = 1.12
LOOKUP_SHARE_OF_DOUBLING = 0.05
# What traffic accepts just now is that of about 512 request-steps: four seconds of one request, a
# step or some of many. What is known of a width halves after about 1400 request-steps of evidence.
LEVEL_DECAY = 1 - 1 / 512
DECAY = 1 - 1 / 2048
# Traffic may change with the width, so that no change of it tells much: it counts for so many
# request-steps, and for a factor of two, at most.
MOST_EVIDENCE = 32
MOST_CHANGE = 2.0
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


class NodeBudget:
    """Chooses the nodes of a step for which tokens per second are highest.

    What a step of a width accepts is what calibration promised of it, times the level that traffic
    keeps of such promises just now, whatever width runs, times the width's own share of that.
    Texts differ more than widths do: one that happened to run while an answer repeated itself is
    no better for it.  So a width is compared with the level of the others just before it ran, near
    widths tell about those that have not run, and a width that runs alone says nothing of itself.
    Level and shares may be more than 1: histories propose too where prompt lookup is on.

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

    Attributes
    ----------
    is_trying : bool
        Whether the last choice since a look was made for what it teaches: by what is known
        another width is better.

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
        self.is_trying = False
        # nodes -> the width's share of the level, as comparisons saw it
        self._evidence: dict[int, DecayedMean] = {}
        # nodes -> request-steps and accepted tokens lately, the older the lighter; and those that
        # were not looked at yet
        self._lately: dict[int, list[float]] = {}
        self._pending: dict[int, list[int]] = {}
        # nodes -> accepted tokens, until the next look: batches of many sizes are priced by it
        self._accepted: dict[int, float] = {}

    @property
    def share(self) -> float:
        """Of the promised accepted tokens, those that come just now, as of the last look."""
        return self._level()[0]

    def _level(self, leave_out: int | None = None) -> tuple[float, float]:
        """What traffic keeps of promises just now, and the request-steps that say so."""
        steps = accepted = expected = 0.0
        for nodes, (own_steps, own_accepted) in self._lately.items():
            if nodes != leave_out:
                steps += own_steps
                accepted += own_accepted
                expected += own_steps * self.promised[nodes] * self._relative(nodes)
        known = min(1.0, steps / PRIOR_STEPS)
        ratio = accepted / expected if expected > 0 else PRIOR_LEVEL
        return known * ratio + (1 - known) * PRIOR_LEVEL, steps

    def _relative(self, nodes: int) -> float:
        """A width's own share of the level, as far as is known."""
        # A width of twice or half the rows counts half.
        near, own = [(float(PRIOR_STEPS), PRIOR_STEPS)], self._evidence.get(nodes)
        for other, evidence in self._evidence.items():
            if other != nodes:
                nearness = min(nodes + 1, other + 1) / max(nodes + 1, other + 1)
                near.append((nearness * evidence.sum, nearness * evidence.steps))
        told = sum(total for total, _ in near) / sum(steps for _, steps in near)
        if own is None:
            return told
        return (own.sum + PRIOR_STEPS * told) / (own.steps + PRIOR_STEPS)

    def _known(self, nodes: int) -> float:
        """How much of what is said of a width is its own steps', 0 to 1."""
        # The level itself, where it is this width's.
        lately = self._lately.get(nodes, (0.0, 0.0))[0]
        return max(self._evidence[nodes].weight(PRIOR_STEPS), lately / (lately + PRIOR_STEPS))

    def settle(self) -> None:
        """Learn from what was observed since the last time."""
        for nodes, (steps, accepted) in self._pending.items():
            level, others = self._level(leave_out=nodes)
            mine = self._lately.setdefault(nodes, [0.0, 0.0])
            evidence = self._evidence.setdefault(nodes, DecayedMean(DECAY))
            expected = steps * level * self.promised[nodes] * self._relative(nodes)
            if others > 0 and expected > 0:
                # The more the level is this width's own, the less it can be measured by it.
                weight = min(steps, MOST_EVIDENCE) * others / (others + mine[0])
                # Half of what differs is this width's, half the others': where it is the traffic
                # that has changed, the change back to them takes both away again.
                part = min(max(accepted / expected, 1 / MOST_CHANGE), MOST_CHANGE) ** 0.5
                shares = {n: own[0] / others for n, own in self._lately.items() if n != nodes}
                known = {n: self._relative(n) for n in (nodes, *shares)}
                evidence.add(known[nodes] * part, weight)
                for other, share in shares.items():
                    self._evidence[other].add(known[other] / part, share * weight)
            kept = LEVEL_DECAY**steps
            for entry in self._lately.values():
                entry[:] = [kept * number for number in entry]
            share = (1 - kept) / (1 - LEVEL_DECAY) / steps
            mine[0] += share * steps
            mine[1] += share * accepted
        self._pending.clear()
        self._accepted.clear()

    def accepted(self, nodes: int) -> float:
        """Tokens that a request's step accepts of so many nodes, as far as is known."""
        if nodes not in self._accepted:
            expected = self._level()[0] * self._relative(nodes) * self.promised[nodes]
            self._accepted[nodes] = min(expected, float(self.depths[nodes]))
        return self._accepted[nodes]

    def observe(self, nodes: int, accepted: int) -> None:
        """Learn from one request's step: nodes verified, tokens accepted beside the root's."""
        if 0 < nodes < len(self.promised):
            pending = self._pending.setdefault(nodes, [0, 0])
            pending[0] += 1
            pending[1] += accepted

    def look(self) -> None:
        """Learn from what was observed, and forget a little.

        Plain steps bring no evidence, so a tree is tried again at last: without any the prior
        weighs as much again after some 380 looks.
        """
        self.settle()
        self.is_trying = False
        self.costs.relax()
        for own in self._evidence.values():
            own.relax()
        for entry in self._lately.values():
            entry[:] = [RELAXATION * number for number in entry]
        self._accepted.clear()

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
        known = {n: self._known(n) for n in self._evidence}
        timed = {n: self.costs.weight(n + 1, requests) for n in self.choices}
        # Nothing is known of any width at the start: no reason to prefer one.
        most = 1.0 if bold else max(known.values(), default=0.0)
        most_timed = max(timed.values(), default=0.0)
        rates, known_rates = {}, {}
        for nodes in self.choices:
            optimism = (BOLDNESS if bold else OPTIMISM) * (most - known.get(nodes, 0.0))
            time_optimism = TIME_OPTIMISM * (most_timed - timed[nodes])
            rate = self.rate(nodes, requests, context, optimism, time_optimism)
            if rate is not None:
                rates[nodes] = rate
                known_rates[nodes] = self.rate(nodes, requests, context)
        if not rates:
            return None
        best = max(rates, key=lambda n: rates[n])
        # Plain decoding need not be better by a margin: no tree may stay that loses to it.
        if current in rates and best != 0 and rates[best] < HYSTERESIS * rates[current]:
            best = current
        # By what is known another would be better, so this one is here to be known.
        self.is_trying = known_rates[best] * HYSTERESIS < max(known_rates.values())
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
        self.budget.look()
        self._is_priced = [False] * len(self._nodes)
