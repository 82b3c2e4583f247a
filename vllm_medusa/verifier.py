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
from typing import NamedTuple

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, get_max_chunk_logits

from vllm_medusa.kernels import WalkOutput, tree_walk
from vllm_medusa.path_chains import ChainRows, PathChains
from vllm_medusa.tree_batch import UNLIMITED, TreeBatch

# logit bias (with allowed tokens and min_tokens), penalties, bad words: vLLM's own.
NUM_STOCK_PROCESSORS = 3


def reads_history(params: SamplingParams) -> bool:
    """Whether one of vLLM's processors looks back over the drafts before a request's row."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.bad_words
        or getattr(params, "thinking_token_budget", None) is not None
    )


def walk_trees(
    batch: TreeBatch,
    drawn: torch.Tensor,  # [num_logits] int64
    tokens: torch.Tensor,  # [num_logits], each row's own input token
    cu_rows: torch.Tensor,  # [num_reqs + 1] int32
    slots: torch.Tensor,  # [num_reqs] int64, -1: no request
    root_positions: torch.Tensor,  # [num_reqs] int64
    prefill_len: torch.Tensor,  # [max_num_reqs] int32
    out: WalkOutput,
) -> WalkOutput:
    """Follow the drawn tokens down every tree, as far as each request may accept."""
    real = slots.clamp(min=0)
    # A request that starts its step inside the prompt carries placeholder drafts
    # (vLLM pads its first decode); its root sits before prefill_len.
    ready = root_positions >= prefill_len[real]
    # vLLM's processors take the ids as they are (int32), the walk as they are drawn.
    tokens = tokens.to(drawn.dtype)
    limits = ready.to(torch.int32) * UNLIMITED
    return tree_walk(drawn, tokens, cu_rows, batch.parents, slots, limits, out=out)


class LogitsRows(NamedTuple):
    """Rows of logits and what vLLM's processors are told of each."""

    logits: torch.Tensor  # [num_rows, vocab_size]
    slots: torch.Tensor  # [num_rows], request slot
    positions: torch.Tensor  # [num_rows] int64
    tokens: torch.Tensor  # [num_rows] int32, the row's own input token
    local_pos: torch.Tensor  # [num_rows] int32, place among the rows of its request


class TreeVerifier(RejectionSampler):
    """Stands where vLLM's runner keeps its rejection sampler."""

    def __init__(self, sampler: Sampler, spec_config, device, tree_batch: TreeBatch):
        super().__init__(sampler, spec_config, device)
        self.tree_batch = tree_batch
        self.chains = PathChains(tree_batch.tree)
        self.reads_history = np.zeros(sampler.needs_logits_processing.shape, dtype=bool)

    def add_request(self, index: int, params: SamplingParams) -> None:
        """Note how the request in slot ``index``, which the sampler knows, is verified."""
        sampler = self.sampler
        custom = len(sampler.logits_processors) > NUM_STOCK_PROCESSORS
        self.reads_history[index] = reads_history(params) or (
            custom and sampler.needs_logits_processing[index]
        )

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
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            out.num_sampled,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=out.tokens,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
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
        num_rows = np.diff(input_batch.cu_num_logits_np)
        chained = self.reads_history[input_batch.idx_mapping_np] & (num_rows > 1)
        sizes = self.chains.lengths(num_rows, chained) if chained.any() else num_rows
        drawn, kept = [], []
        for start, end in _request_chunks(
            np.concatenate([[0], np.cumsum(sizes)]), get_max_chunk_logits(logits.shape[1])
        ):
            lo, hi = (int(input_batch.cu_num_logits_np[i]) for i in (start, end))
            rows = LogitsRows(
                logits[lo:hi],
                input_batch.expanded_idx_mapping[lo:hi],
                positions[lo:hi],
                tokens[lo:hi],
                input_batch.expanded_local_pos[lo:hi],
            )
            chains = None
            if chained[start:end].any():
                chains = self.chains.expand(num_rows[start:end], chained[start:end])
            processed = self._process(rows, input_batch, start, end, chains)
            drawn.append(
                gumbel_sample(
                    processed,
                    rows.slots,
                    states.temperature.gpu,
                    states.seeds.gpu,
                    rows.positions,
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

    def _process(
        self,
        rows: LogitsRows,
        input_batch: InputBatch,
        start: int,  # requests start .. end of the batch
        end: int,
        chains: ChainRows | None,
    ) -> torch.Tensor:
        """Logits after vLLM's processors and sampling parameters, one row a node."""
        sampler, slots = self.sampler, rows.slots
        slots_np = input_batch.idx_mapping_np[start:end]
        if chains is not None:
            index, local_pos, kept = (async_tensor_h2d(a, device=slots.device) for a in chains)
            rows = LogitsRows(*(tensor[index] for tensor in rows))._replace(local_pos=local_pos)
        processed = sampler.apply_sampling_params(
            rows.logits,
            rows.slots,
            input_batch.idx_mapping[start:end],
            slots_np,
            rows.positions,
            rows.tokens,
            rows.local_pos,
            input_batch.seq_lens_cpu_upper_bound.numpy()[start:end],
            # Sorts the vocabulary: not for rows that stand in several chains.
            skip_top_k_top_p=chains is not None,
        )
        if chains is None:
            return processed
        return sampler.sampling_states.apply_top_k_top_p(processed[kept], slots, slots_np)

    def _walk(
        self,
        drawn: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        input_batch: InputBatch,
    ):
        """Walk every tree and remember where each path ends."""
        batch, slots = self.tree_batch, input_batch.idx_mapping
        out = walk_trees(
            batch,
            drawn,
            tokens,
            input_batch.cu_num_logits,
            slots,
            positions[input_batch.cu_num_logits[:-1].long()],
            self.sampler.req_states.prefill_len.gpu,
            WalkOutput.empty(slots.shape[0], drawn.shape[0], batch.num_rows, drawn.device),
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
