"""Verification: vLLM's sampler draws at every node, the walk follows what it drew.

At a node the target's token is drawn as without speculation (temperature, top-k,
top-p, min-p, seed).  If a child holds that token the walk goes there, otherwise
the token is the step's bonus.  Children are chosen deterministically, so q is
one-hot and accepting child x with probability p(x) leaves exactly p: lossless at
any temperature.  vLLM's V2 noise is a function of (seed, position, token), so a
seeded request even gets the tokens that it gets without speculation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, get_max_chunk_logits

from vllm_medusa.kernels import WalkOutput, tree_walk
from vllm_medusa.tree_batch import TreeBatch


def accept_limit(params: SamplingParams) -> int | None:
    """0 for requests whose processors would read a row's history along the batch row order.

    Penalties, bad words, thinking budgets and grammars look back over "the drafts
    before this row", which in a tree are not its ancestors.  At the root there are
    none, so such a request is verified there only: right, and as fast as plain.
    """
    chain_dependent = (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.bad_words
        or params.structured_outputs is not None
        or getattr(params, "thinking_token_budget", None) is not None
    )
    return 0 if chain_dependent else None


class TreeVerifier(RejectionSampler):
    """Stands where vLLM's runner keeps its rejection sampler."""

    def __init__(self, sampler: Sampler, spec_config, device, tree_batch: TreeBatch):
        super().__init__(sampler, spec_config, device)
        self.tree_batch = tree_batch

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

        num_logprobs = self.sampler.sampling_states.max_num_logprobs(input_batch.idx_mapping_np)
        keep_processed = (
            num_logprobs != NO_LOGPROBS and self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        )
        drawn, processed = self._draw(logits, input_batch, positions, tokens, keep_processed)
        out = self._walk(drawn, tokens, positions, input_batch)
        logprobs = self._path_logprobs(
            processed if keep_processed else logits, drawn, out.flat_rows, num_logprobs, input_batch
        )
        return SamplerOutput(
            sampled_token_ids=out.tokens,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=out.num_sampled,
            num_rejected=out.num_rejected,
            sampling_mask_tensors=None,
        )

    def _draw(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        keep_processed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sample every row with vLLM's own sampling parameters, in bounded chunks."""
        states = self.sampler.sampling_states
        drawn, kept = [], []
        for start, end in _request_chunks(
            input_batch.cu_num_logits_np, get_max_chunk_logits(logits.shape[1])
        ):
            lo, hi = (int(input_batch.cu_num_logits_np[i]) for i in (start, end))
            slots = input_batch.expanded_idx_mapping[lo:hi]
            processed = self.sampler.apply_sampling_params(
                logits[lo:hi],
                slots,
                input_batch.idx_mapping[start:end],
                input_batch.idx_mapping_np[start:end],
                positions[lo:hi],
                tokens[lo:hi],
                input_batch.expanded_local_pos[lo:hi],
                input_batch.seq_lens_cpu_upper_bound.numpy()[start:end],
            )
            drawn.append(
                gumbel_sample(
                    processed,
                    slots,
                    states.temperature.gpu,
                    states.seeds.gpu,
                    positions[lo:hi],
                    apply_temperature=False,
                    is_drafting=False,
                    use_fp64=self.sampler.use_fp64_gumbel,
                )
            )
            if keep_processed:
                kept.append(processed)
        single = len(drawn) == 1
        all_drawn = drawn[0] if single else torch.cat(drawn)
        if not keep_processed:
            return all_drawn, None
        return all_drawn, kept[0] if single else torch.cat(kept)

    def _walk(
        self,
        drawn: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        input_batch: InputBatch,
    ) -> WalkOutput:
        """Walk every tree and remember where each path ends."""
        batch, slots = self.tree_batch, input_batch.idx_mapping
        out = WalkOutput.empty(slots.shape[0], drawn.shape[0], batch.num_rows, drawn.device)
        tree_walk(
            out,
            drawn,
            tokens,
            positions,
            input_batch.cu_num_logits,
            input_batch.seq_lens,
            slots,
            batch.parents,
            batch.accept_limits,
            self.sampler.req_states.prefill_len.gpu,
        )
        batch.last_rows = out.last_rows
        return out

    def _path_logprobs(
        self,
        logits: torch.Tensor,
        drawn: torch.Tensor,
        flat_rows: torch.Tensor,  # [num_logits] int64, accepted rows first in each segment
        num_logprobs: int,
        input_batch: InputBatch,
    ) -> LogprobsTensors | None:
        """Log probabilities of the rows that became output, where the scheduler looks for them."""
        if num_logprobs == NO_LOGPROBS:
            return None
        expanded = logits.shape[0] != input_batch.num_reqs
        return compute_topk_scores(
            logits[flat_rows],
            num_logprobs,
            drawn[flat_rows],
            input_batch.cu_num_logits_np.tolist() if expanded else None,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    def profile(self, logits: torch.Tensor) -> None:
        """Allocate what verifying ``logits`` would: the float32 copy of one chunk, and the draw."""
        chunk = logits[: get_max_chunk_logits(logits.shape[1])].float()
        zeros = torch.zeros(chunk.shape[0], dtype=torch.int64, device=chunk.device)
        states = self.sampler.sampling_states
        gumbel_sample(
            chunk,
            zeros,
            states.temperature.gpu,
            states.seeds.gpu,
            zeros,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )


def _request_chunks(cu_num_logits: np.ndarray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Request ranges of at most ``max_rows`` logits rows each; never splits a request."""
    start, num_reqs = 0, cu_num_logits.size - 1
    while start < num_reqs:
        limit = int(cu_num_logits[start]) + max_rows
        end = int(np.searchsorted(cu_num_logits, limit, side="right")) - 1
        end = min(num_reqs, max(end, start + 1))
        yield start, end
        start = end
