"""vLLM's schedulers with statistics that mean something for a tree."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats


class TreeStatsMixin:
    """Counts drafts by depth, not by node.

    A 63-node tree offers at most `depth` tokens a step.  Counting nodes would
    report an acceptance rate of a few per cent and 63 positions, of which all but
    the first few can never be filled.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        tree = vllm_config.speculative_config.token_tree
        # number of nodes -> depth of the tree that this prefix of the list is
        self._depth_of_nodes = [0]
        for depth in tree.depths[1:]:
            self._depth_of_nodes.append(max(depth, self._depth_of_nodes[-1]))

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """One step of one request, in tokens of depth."""
        if not self.log_stats or not num_draft_tokens:
            return None
        if spec_decoding_stats is None:
            spec_decoding_stats = SpecDecodingStats.new(self._depth_of_nodes[-1])
        spec_decoding_stats.observe_draft(
            num_draft_tokens=self._depth_of_nodes[num_draft_tokens],
            num_accepted_tokens=num_accepted_tokens,
        )
        return spec_decoding_stats


class MedusaScheduler(TreeStatsMixin, Scheduler):
    """``scheduler_cls`` without async scheduling."""


class MedusaAsyncScheduler(TreeStatsMixin, AsyncScheduler):
    """``scheduler_cls`` with async scheduling."""
