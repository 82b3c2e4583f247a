"""How many nodes pay on a CPU: what rows cost there against the tokens that a tree promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vllm_medusa.cpu_costs import RowCosts

# Of a plain step of SmolLM2-135M on two Zen 3 cores 74 % is products (23 of 31 ms); heads,
# verification and tree attention add 18 %.
PRODUCT_SHARE = 0.74
TREE_OVERHEAD = 0.18
# Answers to chat questions accept less than the long texts of calibration: depth 1 of the
# shipped heads' 8 best nodes 0.57 to 0.60 of the steps against 0.67.
SERVED_SHARE = 0.8
# Below this promise Medusa stays off. The margin is for the shares above and for timings.
LEAST_PROMISE = 0.9
# Larger batches take the nodes of this one.
LARGEST_BATCH = 64


class Budget(NamedTuple):
    """Nodes for one request, their promised speed-up over plain vLLM, nodes by batch size."""

    nodes: int
    speedup: float
    schedule: list[tuple[int, int, int]]


def choose_budget(frequencies: Sequence[float], costs: RowCosts) -> Budget:
    """Nodes that promise the most tokens a second, by batch size.

    Parameters
    ----------
    frequencies : sequence of float
        Share of the steps whose path holds each node, in the tree's order.
    costs : RowCosts

    Returns
    -------
    Budget
        ``nodes`` is at least 1; ``schedule`` may come to 0, plain decoding, in large batches.

    Examples
    --------
    >>> costs = RowCosts({1: 1.0}, {1: 1.0, 3: 1.0, 4: 1.5})
    >>> choose_budget([0.5, 0.2, 0.1], costs)[:2]
    (2, 1.3220338983050848)
    """

    def rate(batch: int, nodes: int) -> float:
        tokens = 1 + SERVED_SHARE * sum(frequencies[:nodes])
        overhead = TREE_OVERHEAD if nodes else 0.0
        products = PRODUCT_SHARE * cost_of(costs.tree, batch * (nodes + 1))
        return tokens / (products + 1 - PRODUCT_SHARE + overhead)

    nodes = max(range(1, len(frequencies) + 1), key=lambda n: rate(1, n))
    schedule, most = [(1, 1, nodes)], nodes
    for batch in range(2, LARGEST_BATCH + 1):
        # Trees never grow with the batch, whatever a measurement's noise says.
        best = max(range(most + 1), key=lambda n: rate(batch, n))
        if best == most:
            schedule[-1] = (schedule[-1][0], batch, most)
        else:
            schedule.append((batch, batch, best))
        most = best
    return Budget(nodes, rate(1, nodes), schedule)


def cost_of(costs: Mapping[int, float], rows: int) -> float:
    """Cost of the next number of rows that was measured; in proportion beyond the last.

    Examples
    --------
    >>> cost_of({1: 1.0, 6: 1.5}, 4), cost_of({1: 1.0, 6: 1.5}, 12)
    (1.5, 3.0)
    """
    largest = max(costs)
    if rows > largest:
        return costs[largest] * rows / largest
    return costs[min(m for m in costs if m >= rows)]
