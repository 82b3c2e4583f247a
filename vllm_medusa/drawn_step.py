"""Everything after the draw, as one CUDA graph for any mix of trees and prompts.

Top-k, top-p and min-p, logit bias and allowed tokens change how a row's token is drawn, not what
follows from it.  vLLM's own kernels draw it (10 to 20 launches, which depend on the batch), a graph
does the rest: walk, request state, KV move and next drafts.  Log probabilities are read behind it.
Rows lie one after another as in vLLM's batch, so that there is one graph per number of requests,
whatever the sizes of their trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_medusa.vllm_seams import replace_full_graphs

# Between graphs' sizes from 8 and from 64 requests on; the heads run for the padding, too.
SMALL_STEP, LARGE_STEP = 8, 16


def request_counts(most: int) -> Iterator[int]:
    """Sizes of graphs for up to ``most`` requests.

    Examples
    --------
    >>> list(request_counts(100))
    [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    """
    sizes = [1, 2, 4, *range(8, 64, SMALL_STEP), *range(64, most, LARGE_STEP)]
    yield from (size for size in sizes if size < most)
    yield most


class DrawnStep:
    """Walk, request state, KV move and next drafts of R requests whose rows are drawn.

    Parameters
    ----------
    step : vllm_medusa.verification_step.VerificationStep
        Whose buffers it shares: only one of the two runs in a step.

    Attributes
    ----------
    drawn : torch.Tensor, [max_num_tokens] int64
        The target's token at every row.
    flat_rows : torch.Tensor, [max_num_tokens] int64
        As the walk's, for log probabilities.
    cu_rows : torch.Tensor, [max_num_reqs + 1] int32
        First row of each request; those of padding are empty.
    """

    def __init__(self, step: Any):
        runner = step.runner
        self.step, self.runner = step, runner
        self.drawn, self.flat_rows = torch.zeros(
            2, runner.max_num_tokens, dtype=torch.int64, device=runner.device
        )
        self.cu_rows = torch.zeros(runner.max_num_reqs + 1, dtype=torch.int32, device=runner.device)

    def make_graphs(self) -> CudaGraphManager:
        """Graphs for batches of up to as many requests as vLLM's largest graph has rows."""
        runner = self.runner
        manager = CudaGraphManager(
            runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, 1
        )
        most = min(runner.max_num_reqs, runner.compilation_config.max_cudagraph_capture_size)
        full = CUDAGraphMode.FULL
        sizes = [BatchExecutionDescriptor(full, size, size) for size in request_counts(most)]
        replace_full_graphs(manager, sizes)
        return manager

    def capture(self, manager: CudaGraphManager) -> None:
        """Record the step for every size of ``manager``; all rows are padding meanwhile."""
        self.cu_rows.zero_()

        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            return lambda mode: self.compute(desc.num_reqs)

        manager.capture(create, progress_bar_desc="Capturing Medusa graphs behind the draw")

    def compute(self, num_reqs: int) -> None:
        """The step for the first ``num_reqs`` of the slots; reads device memory only."""
        hidden_states = self._static_rows()
        drawn = self.drawn[: hidden_states.shape[0]]
        cu_rows = self.cu_rows[: num_reqs + 1]
        self.step.follow(drawn, hidden_states, cu_rows, num_reqs, self.flat_rows)

    def try_run(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, in_place: bool
    ) -> SamplerOutput | None:
        """Draw launch by launch, then replay the rest, if a graph has room for this batch.

        Parameters
        ----------
        hidden_states : torch.Tensor, [num_tokens, hidden_size]
            Output of the forward pass.
        input_batch : InputBatch
        in_place : bool
            Whether the batch is nothing but trees, and their output where the graph reads it.
        """
        num_reqs, num_rows = input_batch.num_reqs, input_batch.logits_indices.shape[0]
        found = self._graph(num_reqs) if num_rows <= self._static_rows().shape[0] else None
        if found is None:
            return None
        padded_reqs, replay = found
        self.step.set_slots(input_batch, padded_reqs)
        self.cu_rows[: num_reqs + 1].copy_(input_batch.cu_num_logits[: num_reqs + 1])
        if num_reqs < padded_reqs:
            self.cu_rows[num_reqs + 1 : padded_reqs + 1].fill_(num_rows)
        if not in_place:
            hidden_states = self._gather(hidden_states, input_batch)
        verifier, buffers = self.runner.rejection_sampler, self.runner.input_buffers
        logits = self.runner.model.compute_logits(hidden_states[:num_rows])
        positions, tokens = buffers.positions[:num_rows], buffers.input_ids[:num_rows]
        rows = verifier.draw(logits, input_batch, positions, tokens)
        drawn, flat_rows = self.drawn[:num_rows], self.flat_rows[:num_rows]
        drawn.copy_(rows.drawn)
        replay()
        logprobs = verifier.path_logprobs(
            logits if rows.processed is None else rows.processed, drawn, flat_rows, input_batch
        )
        return self.step.take_output(num_reqs, padded_reqs, logprobs=logprobs)

    def _static_rows(self) -> torch.Tensor:
        """Where graphs read rows of the forward pass's output, [num_rows, hidden_size]."""
        return self.step.hidden_states[: self.drawn.shape[0]]

    def _graph(self, num_reqs: int) -> tuple[int, Callable[[], None]] | None:
        """Padded size and replay of the graph for so many requests."""
        manager = self.runner.speculator.drawn_graphs
        if manager is None:
            return None
        desc = manager.dispatch(num_reqs, num_reqs, None, 0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        return desc.num_reqs, lambda: manager.run_fullgraph(desc)

    def _gather(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> torch.Tensor:
        """Place the batch's rows of logits one after another where the graph reads them."""
        runner, source = self.runner, input_batch.logits_indices
        buffers, static, end = runner.input_buffers, self._static_rows(), source.shape[0]
        static[:end].copy_(hidden_states[source])
        for buffer in (buffers.positions, buffers.input_ids):
            buffer[:end].copy_(buffer[source])
        # The walk takes a request's rows for its query; those before them are computed, too.
        own_rows = input_batch.cu_num_logits[: input_batch.num_reqs + 1].diff()
        queries = input_batch.query_start_loc[: input_batch.num_reqs + 1].diff()
        runner.req_states.num_computed_tokens.gpu.index_add_(
            0, input_batch.idx_mapping, queries - own_rows
        )
        return static
