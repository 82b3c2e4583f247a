"""Drawing a token at every row of a verification batch with vLLM's own sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_medusa.path_chains import ChainRows, PathChains
from vllm_medusa.request_options import reads_history
from vllm_medusa.tree import TokenTree
from vllm_medusa.typical_acceptance import Scores, TypicalAcceptance

# logit bias (with allowed tokens and min_tokens), penalties, bad words: vLLM's own.
NUM_STOCK_PROCESSORS = 3
# Typical acceptance holds log probabilities, probabilities and entropies beside the logits.
TYPICAL_COPIES = 4


class LogitsRows(NamedTuple):
    """Rows of logits and what vLLM's processors are told of each."""

    logits: torch.Tensor  # [num_rows, vocab_size]
    slots: torch.Tensor  # [num_rows], request slot
    positions: torch.Tensor  # [num_rows] int64
    tokens: torch.Tensor  # [num_rows] int32, the row's own input token
    local_pos: torch.Tensor  # [num_rows] int32, place among the rows of its request


class RowDraws(NamedTuple):
    """What was drawn, and what else the caller asked for."""

    drawn: torch.Tensor  # [num_logits] int64
    processed: torch.Tensor | None  # [num_logits, vocab_size] after all sampling parameters
    scores: Scores | None  # of the rows of `typical` requests, one after another
    typical: np.ndarray  # [num_typical] places in the batch


class RowSampler:
    """Draws at every node what plain decoding would draw behind the node's path.

    Parameters
    ----------
    sampler : vllm.v1.worker.gpu.sample.sampler.Sampler
    tree : TokenTree
    typical : TypicalAcceptance
        Scores the rows of requests with its rule on the way.

    Attributes
    ----------
    reads_history : numpy.ndarray, [max_num_reqs] bool
        Requests (by slot) whose processors see their trees as chains.
    """

    def __init__(self, sampler: Sampler, tree: TokenTree, typical: TypicalAcceptance):
        self.sampler = sampler
        self.typical = typical
        self.chains = PathChains(tree)
        self.reads_history = np.zeros(sampler.needs_logits_processing.shape, dtype=bool)

    def add_request(self, index: int, params: SamplingParams) -> None:
        """Note whether the request in slot ``index``, known to the sampler, needs chains."""
        sampler = self.sampler
        custom = len(sampler.logits_processors) > NUM_STOCK_PROCESSORS
        self.reads_history[index] = reads_history(params) or (
            custom and sampler.needs_logits_processing[index]
        )

    def draw(
        self,
        logits: torch.Tensor,  # [num_logits, vocab_size]
        input_batch: InputBatch,
        positions: torch.Tensor,  # [num_logits] int64
        tokens: torch.Tensor,  # [num_logits] int32, negative: no node
        keep_processed: bool,
    ) -> RowDraws:
        """Sample every row with vLLM's own sampling parameters, in bounded chunks."""
        cu_rows, slots_np = input_batch.cu_num_logits_np, input_batch.idx_mapping_np
        num_rows = np.diff(cu_rows)
        chained = self.reads_history[slots_np] & (num_rows > 1)
        sizes = self.chains.lengths(num_rows, chained) if chained.any() else num_rows
        typical = self.typical.active[slots_np]
        limit = get_max_chunk_logits(logits.shape[1])
        if typical.any():
            limit = max(1, limit // TYPICAL_COPIES)
        drawn, kept, scores = [], [], []
        for start, end in request_chunks(sizes, limit):
            lo, hi = int(cu_rows[start]), int(cu_rows[end])
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
            drawn.append(self._draw(processed, rows))
            if keep_processed:
                kept.append(processed)
            if typical[start:end].any():
                which = np.flatnonzero(np.repeat(typical[start:end], num_rows[start:end]))
                scores.append(
                    self.typical.score(processed, rows.tokens, rows.slots, rows.local_pos, which)
                )
        return RowDraws(
            _joined(drawn),
            _joined(kept) if keep_processed else None,
            Scores(*(_joined(parts) for parts in zip(*scores, strict=True))) if scores else None,
            np.flatnonzero(typical),
        )

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

    def _draw(self, logits: torch.Tensor, rows: LogitsRows) -> torch.Tensor:
        states = self.sampler.sampling_states
        return gumbel_sample(
            logits,
            rows.slots,
            states.temperature.gpu,
            states.seeds.gpu,
            rows.positions,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )

    def profile(self, logits: torch.Tensor) -> None:
        """Allocate what drawing at ``logits`` would: one chunk in float32, and the draw."""
        chunk = logits[: get_max_chunk_logits(logits.shape[1])].float()
        zeros = torch.zeros(chunk.shape[0], dtype=torch.int64, device=chunk.device)
        self._draw(chunk, LogitsRows(chunk, zeros, zeros, zeros, zeros))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def request_chunks(sizes: np.ndarray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of requests with at most ``max_rows`` rows in all; never splits a request.

    Examples
    --------
    >>> list(request_chunks(np.array([4, 4, 9, 2]), 8))
    [(0, 2), (2, 3), (3, 4)]
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    start = 0
    while start < len(sizes):
        end = int(np.searchsorted(ends, ends[start] + max_rows, side="right")) - 1
        end = min(len(sizes), max(end, start + 1))
        yield start, end
        start = end
