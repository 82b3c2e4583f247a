"""vLLM's V2 model runner, taught to lay drafts out as a tree.

Only what has no hook of its own is overridden: which speculator is built, the
sampler that verifies, positions of tree rows, and the KV move after acceptance.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_medusa import vllm_seams
from vllm_medusa.compaction import PathCompactor
from vllm_medusa.kernels import WalkOutput
from vllm_medusa.lora_rows import TreeLoraState, base_logits
from vllm_medusa.proposer import MedusaProposer
from vllm_medusa.rank_agreement import RankCheck, check_is_on
from vllm_medusa.request_options import RequestOptions, keeps_start_up_tree
from vllm_medusa.rope_positions import follow_depths
from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.verification_step import VerificationStep
from vllm_medusa.verifier import TreeVerifier


class TreeRunnerMixin:
    """Mixed into vLLM's GPU and CPU V2 runners.

    Attributes
    ----------
    verifier_class, step_class : type
        What verifies launch by launch and as one graph; benchmarks put others here.
    """

    verifier_class: type[TreeVerifier] = TreeVerifier
    step_class: type[VerificationStep] = VerificationStep

    def __init__(self, vllm_config: Any, device: torch.device):
        config = vllm_config.speculative_config
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.tree_batch = TreeBatch(
            config.token_tree, max_num_reqs, device, config.row_counts(max_num_reqs)
        )
        self.path_compactor: PathCompactor | None = None
        self.verification_step: VerificationStep | None = None
        self.rank_check: RankCheck | None = None

        def make_proposer(config: Any, target: torch.device, req_states: Any) -> MedusaProposer:
            if config.speculative_config.prompt_lookup > 0:
                vllm_seams.keep_history_on_device(req_states)
            return MedusaProposer(config, target, self.tree_batch, req_states)

        with vllm_seams.speculator_factory(make_proposer):
            super().__init__(vllm_config, device)
        if self.lora_config is not None:
            self.lora_state = TreeLoraState(max_num_reqs, self.tree_batch)
        if check_is_on():
            self.rank_check = RankCheck(self)

    def load_model(self, *args, **kwargs) -> None:
        """Load the target and the heads; :meth:`build_verifier` is to follow."""
        super().load_model(*args, **kwargs)
        self.base_logits = self.model.compute_logits
        if self.lora_config is not None:
            self.base_logits = base_logits(self.model)
            if self.speculator is not None:
                self.speculator.use_base_logits(self.base_logits)
        if self.model_config.uses_mrope:
            follow_depths(self.model_state, self.tree_batch)

    def build_verifier(self) -> None:
        """Put the tree verifier where vLLM keeps its rejection sampler.

        Called by the worker outside vLLM's memory pool of weights: sleep of level 2 throws
        that away and brings back parameters and buffers of the models only.
        """
        if self.is_last_pp_rank and self.sampler is not None:
            self.rejection_sampler = self.verifier_class(
                self.sampler, self.speculative_config, self.device, self.tree_batch
            )
            self.verification_step = self.step_class(self)
            self.speculator.verification_step = self.verification_step
            self.speculator.build_drafter()

    def head_bytes(self) -> int:
        """Bytes of the heads on this rank; only the last pipeline stage has any."""
        if self.speculator is None:
            return 0
        tensors = [*self.speculator.model.parameters(), *self.speculator.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def initialize_kv_cache(self, *args, **kwargs) -> None:
        """Allocate the cache, give the builders this runner's trees, find the layers to compact."""
        super().initialize_kv_cache(*args, **kwargs)
        for groups in self.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    builder.tree_batch = self.tree_batch
        self.path_compactor = PathCompactor.for_runner(self)

    def update_pp_decode_requests(self) -> None:
        """Advance an earlier stage's requests by what the last stage sampled for them."""
        if self.rank_check is not None:
            self.rank_check.begin_step()
        super().update_pp_decode_requests()

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample as vLLM does; first compare the ranks' last step if the user asked for it."""
        if self.rank_check is not None:
            self.rank_check.compare()
        return super().sample_tokens(grammar_output)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Register requests; remember how each is verified, and which a graph may sample."""
        super().add_requests(scheduler_output)
        if self.verification_step is None:
            return
        self.verification_step.next_nodes = scheduler_output.num_spec_tokens_to_schedule
        if not scheduler_output.scheduled_new_reqs:
            return
        self.verification_step.read_requests()
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            if params is None:
                continue
            index = self.req_states.req_id_to_index[request.req_id]
            options = RequestOptions.of(params.extra_args, self.speculative_config)
            self.rejection_sampler.add_request(index, params, options)
            if self.speculative_config.dynamic_tree:
                self.tree_batch.keep_tree(index, self._keeps_tree(index, params))
            self.verification_step.add_request(index, params)

    def _keeps_tree(self, index: int, params: Any) -> bool:
        """Whether the host lays out a request's rows, by the only tree that it knows."""
        processors_see_chains = self.rejection_sampler.row_sampler.reads_history[index]
        return keeps_start_up_tree(params) or bool(processors_see_chains)

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Map slots from linear positions, then give tree rows the position of their depth."""
        prepared = super().prepare_attn(input_batch)
        self.tree_batch.begin_step(input_batch)
        return prepared

    def prepare_dummy_attn(
        self, input_batch: InputBatch, *args, **kwargs
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Dummy batches of a full query length are captured as verification batches."""
        self.tree_batch.begin_dummy_step(input_batch)
        return super().prepare_dummy_attn(input_batch, *args, **kwargs)

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        """Profile the sampler at verification's size: N + 1 rows of logits per request."""
        super()._dummy_sampler_run(hidden_states)
        rows = min(self.max_num_reqs * self.decode_query_len, self.max_num_tokens)
        if rows > hidden_states.shape[0]:
            sample = hidden_states.new_zeros(rows, hidden_states.shape[1])
            logits = self.base_logits(sample)
            self.rejection_sampler.profile(logits)

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output: Any
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """Replay the whole rest of the step where a graph covers it, else sample as vLLM does."""
        if self.verification_step is not None and grammar_output is None:
            output = self.verification_step.try_run(hidden_states, input_batch)
            if output is not None:
                return output, output.num_sampled, output.num_rejected
        return super().sample(hidden_states, input_batch, grammar_output)

    def postprocess_sampled(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs] int64, -1: skip
        sampled_tokens: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        query_start_loc: torch.Tensor | None = None,
    ) -> None:
        """Advance the requests, then move the accepted rows' KV behind their roots.

        Nothing is left to do where the step's graph has done both.
        """
        num_computed = self.req_states.num_computed_tokens.gpu
        if self.tree_batch.drafts is None:
            super().postprocess_sampled(
                idx_mapping, sampled_tokens, num_sampled, num_rejected, query_start_loc
            )
        if self.rank_check is not None:
            self.rank_check.note(idx_mapping, sampled_tokens, num_sampled, num_computed)
        if self.tree_batch.drafts is not None:
            return
        # One column means that no request of the batch had drafts.
        if sampled_tokens.shape[1] == self.decode_query_len and self.path_compactor is not None:
            self.path_compactor.compact(
                idx_mapping,
                sampled_tokens,
                num_sampled,
                num_computed,
            )

    def finish_advance(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs] int64, -1: skip
        walk: WalkOutput,
    ) -> None:
        """What :meth:`postprocess_sampled` does beside what the walk has done already."""
        num_computed = self.req_states.num_computed_tokens.gpu
        self.model_state.postprocess_state(idx_mapping, walk.num_sampled, num_computed)
        if self.path_compactor is not None:
            self.path_compactor.move(idx_mapping, walk.root_positions, walk.path_masks)
