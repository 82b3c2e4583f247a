"""Verification: vLLM's sampler draws at every node, the walk follows what it drew.

At a node the target's token is drawn as without speculation (temperature, top-k,
top-p, min-p, seed).  If a child holds that token the walk goes there, otherwise
the token is the step's bonus.  Children are chosen deterministically, so q is
one-hot and accepting child x with probability p(x) leaves exactly p: lossless at
any temperature.  vLLM's V2 noise is a function of (seed, position, token), so a
seeded request even gets the tokens that it gets without speculation.
"""

from __future__ import annotations

import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_medusa.kernels import WalkOutput, tree_walk
from vllm_medusa.request_options import RequestOptions
from vllm_medusa.row_sampling import RowDraws, RowSampler
from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.typical_acceptance import TypicalAcceptance


class TreeVerifier(RejectionSampler):
    """Stands where vLLM's runner keeps its rejection sampler."""

    def __init__(self, sampler: Sampler, spec_config, device, tree_batch: TreeBatch):
        super().__init__(sampler, spec_config, device)
        self.tree_batch = tree_batch
        self.typical = TypicalAcceptance(tree_batch)
        self.row_sampler = RowSampler(sampler, tree_batch.tree, self.typical)

    def add_request(self, index: int, params: SamplingParams, options: RequestOptions) -> None:
        """Note how the request in slot ``index``, known to the sampler, is verified."""
        self.row_sampler.add_request(index, params)
        greedy = self.sampler.sampling_states.temperature.np[index] == 0.0
        self.typical.add_request(index, options, greedy)

    def __call__(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,  # [num_logits] bool
    ) -> SamplerOutput:
        """Draw at every row, walk every tree, return the accepted tokens and one bonus each.

        Returns
        -------
        SamplerOutput
            ``sampled_token_ids`` [num_reqs, N + 1] int64: accepted tokens and bonus
            first; its last column carries the path mask (see ``tree_walk``) to
            every pipeline stage.
        """
        num_nans = get_num_nans(logits) if self.sampler.compute_nans else None
        rows = input_batch.logits_indices
        positions = input_batch.positions[rows]
        tokens = input_batch.input_ids[rows]
        if invalid_drafts is not None:
            tokens = tokens.masked_fill(invalid_drafts, -1)

        rows = self.draw(logits, input_batch, positions, tokens)
        drawn, out = self._walk(rows, tokens, positions, input_batch)
        logprobs = self.path_logprobs(
            logits if rows.processed is None else rows.processed, drawn, out.flat_rows, input_batch
        )
        return SamplerOutput(
            sampled_token_ids=out.tokens,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=out.num_sampled,
            num_rejected=out.num_rejected,
            sampling_mask_tensors=None,
        )

    def draw(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        input_batch: InputBatch,
        positions: torch.Tensor,  # [num_logits] int64
        tokens: torch.Tensor,  # [num_logits] int32, negative: no node
    ) -> RowDraws:
        """The target's token at every row; processed logits if log probabilities are theirs."""
        keep_processed = (
            self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
            and self.sampler.get_logprobs_dims(input_batch.idx_mapping_np) is not None
        )
        return self.row_sampler.draw(logits, input_batch, positions, tokens, keep_processed)

    def _walk(
        self,
        rows: RowDraws,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        input_batch: InputBatch,
    ) -> tuple[torch.Tensor, WalkOutput]:
        """Walk every tree and remember where each path ends; also the token of every row."""
        batch, slots, drawn = self.tree_batch, input_batch.idx_mapping, rows.drawn
        cu_rows, limits = input_batch.cu_num_logits, None
        prefill_len = self.sampler.req_states.prefill_len.gpu
        if rows.scores is not None:
            roots = positions[cu_rows[:-1].long()]
            # A request that starts its step inside the prompt carries placeholder drafts (vLLM
            # pads its first decode).
            ready = roots >= prefill_len[slots.clamp(min=0)]
            drawn, tokens, limits = self.typical.steer(
                rows.scores, rows.typical, drawn, tokens, cu_rows, slots, ready
            )
        out = WalkOutput.empty(slots.shape[0], drawn.shape[0], batch.num_rows, drawn.device)
        tree_walk(
            out,
            drawn,
            tokens,
            positions,
            cu_rows,
            input_batch.seq_lens,
            slots,
            batch.parents,
            prefill_len,
            accept_limits=limits,
        )
        batch.last_rows = out.last_rows
        return drawn, out

    def path_logprobs(
        self,
        logits: torch.Tensor,
        drawn: torch.Tensor,
        flat_rows: torch.Tensor,  # [num_logits] int64, accepted rows first in each segment
        input_batch: InputBatch,
    ) -> LogprobsTensors | None:
        """Log probabilities of the rows that became output, where the scheduler looks for them."""
        wanted = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        if wanted is None:
            return None
        # So many likeliest tokens, and those that requests name.
        num_logprobs, num_named = wanted
        expanded = logits.shape[0] != input_batch.num_reqs
        return compute_topk_scores(
            logits[flat_rows],
            num_logprobs,
            drawn[flat_rows],
            input_batch.cu_num_logits_np.tolist() if expanded else None,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            # Rows change places within their request only.
            expanded_idx_mapping=input_batch.expanded_idx_mapping,
            max_per_req_token_ids=num_named,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    def profile(self, logits: torch.Tensor) -> None:
        """Allocate what verifying ``logits`` would."""
        self.row_sampler.profile(logits)
