"""``worker_extension_cls`` that holds a step's nodes at what a benchmark wants, and times steps.

Scheduler and worker share a process where an engine has one worker (vLLM's uniproc executor), so
that ``collective_rpc`` reaches both.
"""

from __future__ import annotations

from typing import Any

from step_meter import StepMeter

from vllm_medusa.scheduler import TreeSchedulerMixin

_schedulers: list[TreeSchedulerMixin] = []
_init = TreeSchedulerMixin.__init__


def _noted_init(self: TreeSchedulerMixin, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    _schedulers.append(self)


# The worker, and this module with it, is there before the scheduler is made.
TreeSchedulerMixin.__init__ = _noted_init


class ForcedLookup:
    """vLLM's lookup ``batch size -> nodes``, the same for all; ``chosen`` goes on learning."""

    def __init__(self, chosen: Any, nodes: int):
        self.chosen, self.nodes = chosen, nodes

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, requests: int) -> int:
        return self.nodes

    def look_again(self, context: float) -> None:
        """Of a priced lookup."""
        self.chosen.look_again(context)


class ForcedNodes(StepMeter):
    """Mixed into the worker by vLLM."""

    def force_nodes(self, nodes: int | None) -> dict[str, Any]:
        """So many nodes at every batch size from now on; None gives the choice back.

        Returns
        -------
        dict
            ``nodes_by_batch_size`` as it was chosen, ``share`` of the tree's promises that
            requests keep (None without prices).

        Raises
        ------
        RuntimeError
            The scheduler runs in another process.
        ValueError
            The engine's tree has fewer nodes.
        """
        if len(_schedulers) != 1:
            raise RuntimeError(
                f"found {len(_schedulers)} schedulers in the worker's process, expected 1: run one "
                "worker on a GPU, or with VLLM_ENABLE_V1_MULTIPROCESSING=0 on a CPU"
            )
        scheduler = _schedulers[0]
        most = scheduler._speculative_config.token_tree.num_nodes
        if nodes is not None and nodes > most:
            raise ValueError(
                f"nodes is {nodes}, expected at most the {most} of the engine's tree, as a wider "
                "step verifies the same ones; set num_speculative_tokens or leave this width out"
            )
        lookup = scheduler.dynamic_sd_lookup
        if isinstance(lookup, ForcedLookup):
            lookup = lookup.chosen
        scheduler.dynamic_sd_lookup = lookup if nodes is None else ForcedLookup(lookup, nodes)
        budget = scheduler._budget
        return {
            "nodes_by_batch_size": [lookup[size] for size in range(1, len(lookup))],
            "share": None if budget is None else budget.share,
        }

    def expected_steps(self, requests: int) -> list[dict[str, float]]:
        """What the choice expects of a batch's steps at every width, at the mean context.

        Returns
        -------
        list of dict
            ``nodes``, ``ms`` of a step, ``accepted`` tokens of a request; empty without prices.
        """
        scheduler = _schedulers[0]
        budget, context = scheduler._budget, scheduler._context
        if budget is None:
            return []
        times = {n: budget.costs.of(n + 1, requests, context) for n in budget.choices}
        return [
            {"nodes": nodes, "ms": 1e3 * seconds, "accepted": budget.accepted(nodes)}
            for nodes, seconds in times.items()
            if seconds is not None
        ]
