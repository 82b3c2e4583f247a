"""vLLM's schedulers, taught that drafts are a tree: grammar masks, statistics."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_medusa.grammar_masks import tree_masks
from vllm_medusa.node_budget import NodeBudget, PricedLookup
from vllm_medusa.request_options import RequestOptions, keeps_start_up_tree
from vllm_medusa.served_costs import ServedCosts, StepClock
from vllm_medusa.step_costs import StepCosts

logger = init_logger(f"vllm.{__name__}")

# Steps between two looks at the nodes' price; 32 are a quarter of a second of an 8B model.
STEPS_PER_LOOK = 32
# A width that is only tried teaches enough in fewer: of what simulated traffic loses in its first
# 1,600 steps to the best width, 0.9 % with 32, about half is left with 8.
STEPS_PER_TRY = 8
# Of prompts in a step that counts as one of its width. Longer ones cost alike under all widths.
MOST_ROWS_BESIDE = 256


class TreeSchedulerMixin:
    """Grammars follow the paths of a tree, and drafts are counted by depth, not by node.

    A 63-node tree offers at most `depth` tokens a step.  Counting nodes would
    report an acceptance rate of a few per cent and 63 positions, of which all but
    the first few can never be filled.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        self._speculative_config = vllm_config.speculative_config
        self._tree = tree = self._speculative_config.token_tree
        self._node_budgets: dict[str, int] = {}  # request id -> most nodes
        # number of nodes -> depth of the tree that this prefix of the list is
        self._depth_of_nodes = [0]
        for depth in tree.depths[1:]:
            self._depth_of_nodes.append(max(depth, self._depth_of_nodes[-1]))
        # The same where requests choose their trees, which may be chains: at most this deep.
        self._chosen_depths = self._depth_of_nodes
        if self._speculative_config.dynamic_tree:
            deepest = self._speculative_config.deepest_path
            self._chosen_depths = [min(n, deepest) for n in range(tree.num_rows)]
        self._max_depth = max(self._depth_of_nodes[-1], self._chosen_depths[-1])
        self._budget = self._read_budget(vllm_config)
        self._steps_to_look = 0
        self._clock, self._context = StepClock(), 0.0

    def _read_budget(self, vllm_config: Any) -> NodeBudget | None:
        """What steps cost, as the workers measured it; None where the schedule stays as it is."""
        config = self._speculative_config
        if not config.node_frequencies or self.dynamic_sd_lookup is None:
            return None
        path = config.costs_file(vllm_config.instance_id)
        try:
            costs = StepCosts.load(path)
            path.unlink()
        except FileNotFoundError:
            # Workers on another host, or pipeline stages, which are not timed.
            logger.info("Medusa: no times of steps found here; nodes follow the fixed schedule")
            return None
        choices = {1, *config.row_counts(self.max_num_running_reqs)}
        budget = NodeBudget(
            config.node_frequencies,
            [rows - 1 for rows in choices],
            ServedCosts(costs),
            self._chosen_depths,
            lookup=config.prompt_lookup > 0,
        )
        self.dynamic_sd_lookup = lookup = PricedLookup(budget, self.dynamic_sd_lookup)
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < len(lookup)]
        logger.info("Medusa: nodes by batch size %s", {size: lookup[size] for size in sizes})
        return budget

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's own; every now and then the nodes of a step are chosen anew."""
        if self._budget is not None:
            self._steps_to_look -= 1
            if self._steps_to_look < 0:
                self._steps_to_look = STEPS_PER_LOOK
                computed = sum(request.num_computed_tokens for request in self.running)
                self._context = computed / max(1, len(self.running))
                self.dynamic_sd_lookup.look_again(self._context)
        output = super().schedule(*args, **kwargs)
        if self._budget is not None and self._budget.is_trying:
            self._steps_to_look = min(self._steps_to_look, STEPS_PER_TRY)
        return output

    def add_request(self, request: Request) -> None:
        """Remember the request's own node budget; count its acceptance by depth."""
        super().add_request(request)
        if request.spec_decode_metrics is not None:
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(self._max_depth)
        extra_args = getattr(request.sampling_params, "extra_args", None)
        nodes = RequestOptions.of(extra_args, self._speculative_config).nodes
        if nodes is not None:
            self._node_budgets[request.request_id] = nodes

    def _depth(self, request_id: str, num_nodes: int) -> int:
        """Most tokens that so many nodes of a request can offer."""
        request = self.requests.get(request_id)
        chooses = request is not None and not keeps_start_up_tree(request.sampling_params)
        return (self._chosen_depths if chooses else self._depth_of_nodes)[num_nodes]

    def _cut_to_budgets(self) -> None:
        """Cut next drafts to the budgets of their requests: every prefix is a tree."""
        for request_id, nodes in list(self._node_budgets.items()):
            request = self.requests.get(request_id)
            if request is None:
                del self._node_budgets[request_id]
            else:
                request.spec_token_ids = request.spec_token_ids[:nodes]

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Async scheduling places the next drafts here, before they are known."""
        super()._update_after_schedule(scheduler_output)
        self._cut_to_budgets()

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the drafts of the next step (without async scheduling), whatever a grammar says.

        vLLM would keep them up to the first that does not follow the one before it; in a
        tree each follows its parent, and :meth:`get_grammar_bitmask` sees to the rest.
        """
        for request_id, tokens in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                request.spec_token_ids = [] if request.is_prefill_chunk else tokens
        self._cut_to_budgets()

    def update_draft_token_ids_in_output(
        self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput
    ) -> None:
        """The same for drafts that became known after their step was scheduled."""
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        for request_id, tokens in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            if scheduled.get(request_id):
                # A tree that the scheduler has cut, or that is longer than was drafted.
                cut = tokens[: len(scheduled[request_id])]
                missing = len(scheduled[request_id]) - len(cut)
                scheduled[request_id] = cut + [-1] * missing
        scheduler_output.num_invalid_spec_tokens = {}

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Masks of all nodes of the requests with structured output, each along its path."""
        if not scheduler_output.has_structured_output_requests:
            return None
        request_ids = [
            request_id
            for request_id in scheduler_output.num_scheduled_tokens
            if (request := self.requests.get(request_id))
            and request.use_structured_output
            and not request.is_prefill_chunk
        ]
        if not request_ids:
            return None
        masks, acceptable = tree_masks(
            self.structured_output_manager,
            self._tree,
            self.requests,
            request_ids,
            scheduler_output.scheduled_spec_decode_tokens,
        )
        return GrammarOutput(request_ids, masks, acceptable)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """vLLM's own; per-request metrics are told to leave out what depth does not count."""
        if self._budget is not None:
            self._time_step(scheduler_output)
        if self.spec_decode_metrics_level != "none":
            scheduler_output.num_invalid_spec_tokens = {
                request_id: len(tokens) - self._depth(request_id, len(tokens))
                for request_id, tokens in scheduler_output.scheduled_spec_decode_tokens.items()
            }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self.running:
            self._clock.stop()
        return outputs

    def _time_step(self, scheduler_output: SchedulerOutput) -> None:
        """Tell the budget how long a step of its width took, short prompts beside it included."""
        seconds = self._clock.tick()
        requests = len(scheduler_output.num_scheduled_tokens)
        trees = scheduler_output.scheduled_spec_decode_tokens
        if trees:
            # Fewer rows beside them are a request's own budget: not a step of this width.
            rows, decoding = 1 + max(map(len, trees.values())), len(trees)
        elif scheduler_output.num_spec_tokens_to_schedule == 0:
            rows, decoding = 1, requests
        else:
            return  # prompts before their first tree
        beside = scheduler_output.total_num_scheduled_tokens - rows * decoding
        if seconds is not None and requests and 0 <= beside <= MOST_ROWS_BESIDE:
            self._budget.costs.observe(rows, requests, self._context, seconds)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """One step of one request, in tokens of depth."""
        if self._budget is not None:
            self._budget.observe(num_draft_tokens, num_accepted_tokens)
        if not self.log_stats or not num_draft_tokens:
            return None
        if spec_decoding_stats is None:
            spec_decoding_stats = SpecDecodingStats.new(self._max_depth)
        spec_decoding_stats.observe_draft(
            num_draft_tokens=self._depth(request_id, num_draft_tokens),
            num_accepted_tokens=num_accepted_tokens,
        )
        return spec_decoding_stats


class MedusaScheduler(TreeSchedulerMixin, Scheduler):
    """``scheduler_cls`` without async scheduling."""


class MedusaAsyncScheduler(TreeSchedulerMixin, AsyncScheduler):
    """``scheduler_cls`` with async scheduling."""
