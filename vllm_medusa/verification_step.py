"""Everything after the forward pass, as one CUDA graph.

At batch 1 the GPU needs about 0.3 ms for it, but some 60 launches from Python took 2.5 ms
on an H100's host; replaying them costs the host about 20 us.  The graph verifies trees of equal
size.  Where a step is something else (a prefill, trees cut differently) its rows are laid out as
such trees first.  Where tokens take more than a temperature to draw, a graph covers the rest
(:mod:`vllm_medusa.drawn_step`).  Steps that need more than a draw (processors that look back,
grammars, log probabilities of prompts) run launch by launch through vLLM's own ``sample`` /
``postprocess_sampled`` / ``propose``, with equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_medusa.drawn_step import DrawnStep
from vllm_medusa.graph_requests import needs_only_draw, needs_only_temperature
from vllm_medusa.kernels import RequestState, WalkOutput, tree_walk


class VerificationStep:
    """lm_head, draw, walk, request state, KV move and next drafts of R trees of equal size.

    Parameters
    ----------
    runner : TreeRunnerMixin
        Whose model, sampler, buffers and proposer the step works on.

    Attributes
    ----------
    simple : numpy.ndarray, [max_num_reqs] bool
        Requests that :func:`~vllm_medusa.graph_requests.needs_only_temperature`.
    drawable : numpy.ndarray, [max_num_reqs] bool
        Requests that :func:`~vllm_medusa.graph_requests.needs_only_draw`.
    drawn_step : DrawnStep
        Takes batches in which not all requests are simple, but all are drawable.
    hidden_states : torch.Tensor or None, [num_tokens, hidden_size]
        Where the graphs read the forward pass's output; None without graphs.
    next_nodes : int
        Nodes of the step after this one, as the scheduler announced them.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        self.tree_batch = runner.tree_batch
        self.width = self.tree_batch.num_rows
        max_num_reqs, device = runner.max_num_reqs, runner.device
        self.simple = np.zeros(max_num_reqs, dtype=bool)
        self.drawable = np.zeros(max_num_reqs, dtype=bool)
        self.hidden_states: torch.Tensor | None = None
        self.next_nodes = self.tree_batch.tree.num_nodes
        # Batch row -> request slot; negative rows are the padding of a graph's size.
        self.slots = torch.full((max_num_reqs,), -1, dtype=torch.int64, device=device)
        self.cu_rows = {
            rows: torch.arange(0, (max_num_reqs + 1) * rows, rows, dtype=torch.int32, device=device)
            for rows in self.tree_batch.row_counts
        }
        # Tokens [R, W] int64, then num_sampled and num_rejected [2, R] int32, so that one
        # clone takes a step's output out of the graph's reach.
        self.output = torch.zeros(max_num_reqs * (self.width + 1), dtype=torch.int64, device=device)
        # Copies that keep their address: vLLM's own move to another buffer with every new
        # request, and a graph would go on reading the old one.
        self.temperature = torch.zeros(max_num_reqs, dtype=torch.float32, device=device)
        # As drafts are to be drawn: 0 also where typical acceptance judges them.
        self.draft_temperature = torch.zeros_like(self.temperature)
        self.seeds = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self.prefill_len = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.drafts = torch.zeros(max_num_reqs, self.width - 1, dtype=torch.int64, device=device)
        self.drawn_step = DrawnStep(self)

    def add_request(self, index: int, params: SamplingParams) -> None:
        """Note which graphs serve the request in slot ``index``, known to sampler and verifier."""
        verifier = self.runner.rejection_sampler
        is_exact = not verifier.typical.active[index]
        self.draft_temperature[index] = params.temperature if is_exact else 0.0
        self.simple[index] = is_exact and needs_only_temperature(self.runner.sampler, index, params)
        self.drawable[index] = is_exact and needs_only_draw(verifier.row_sampler, index, params)

    def make_graphs(self, mode: CUDAGraphMode) -> CudaGraphManager | None:
        """Graphs for the batch sizes at which vLLM captures verification.

        None where the forward pass is not one graph either, and with LoRA, whose lm_head
        reads per-step adapter indices.
        """
        runner = self.runner
        if mode.decode_mode() != CUDAGraphMode.FULL or runner.lora_config is not None:
            return None
        return CudaGraphManager(
            runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, self.width
        )

    def read_requests(self) -> None:
        """Copy what the graph reads of every request; to be called after requests came in."""
        states = self.runner.sampler.sampling_states
        self.temperature.copy_(states.temperature.gpu)
        self.seeds.copy_(states.seeds.gpu)
        self.prefill_len.copy_(self.runner.req_states.prefill_len.gpu)

    def try_run(self, hidden_states: torch.Tensor, input_batch: InputBatch) -> SamplerOutput | None:
        """Verify, advance the requests and draft, if a graph covers this batch.

        Returns
        -------
        SamplerOutput or None
            None: nothing was done.  Otherwise ``tree_batch.drafts`` holds the next
            drafts, and requests and KV cache are already advanced.
        """
        slots_np, num_reqs = input_batch.idx_mapping_np, input_batch.num_reqs
        if self.hidden_states is None or not self.drawable[slots_np].all():
            return None
        rows = self._equal_rows(input_batch)
        # Only a replayed forward pass leaves its output where the graph reads it.
        is_laid_out = rows is not None and self._is_static(hidden_states)
        # Before plain steps nothing is drafted, and vLLM's own sampler is all that is left.
        if not is_laid_out and self.next_nodes == 0:
            return None
        found = None
        if self.simple[slots_np].all():
            found = (
                self._graph(num_reqs, rows) if is_laid_out else self._smallest_graph(input_batch)
            )
        if found is None:
            return self.drawn_step.try_run(hidden_states, input_batch, is_laid_out)
        padded_reqs, rows, replay = found
        self.set_slots(input_batch, padded_reqs)
        missing = None if is_laid_out else self._lay_out(hidden_states, input_batch, rows)
        replay()
        return self.take_output(num_reqs, padded_reqs, missing)

    def set_slots(self, input_batch: InputBatch, padded_reqs: int) -> None:
        """Tell a graph of ``padded_reqs`` requests which they are."""
        num_reqs = input_batch.num_reqs
        self.slots[:num_reqs].copy_(input_batch.idx_mapping)
        if num_reqs < padded_reqs:
            self.slots[num_reqs:padded_reqs].fill_(-1)

    def take_output(
        self,
        num_reqs: int,
        padded_reqs: int,
        missing: torch.Tensor | None = None,  # [num_reqs] int32, rows that are no rejected ones
        logprobs: LogprobsTensors | None = None,
    ) -> SamplerOutput:
        """What a replayed graph has left."""
        self.tree_batch.drafts = self.drafts[:num_reqs]
        # The next replay overwrites the output while vLLM may still copy it to the host.
        used = self.output[: padded_reqs * (self.width + 1)].clone()
        tokens, counts = self._views(used, padded_reqs)
        num_rejected = counts[1, :num_reqs]
        return SamplerOutput(
            sampled_token_ids=tokens[:num_reqs],
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=counts[0, :num_reqs],
            num_rejected=num_rejected if missing is None else (num_rejected - missing).clamp_(0),
            sampling_mask_tensors=None,
        )

    def _equal_rows(self, input_batch: InputBatch) -> int | None:
        """Rows of every request, if all verify trees of one size and do nothing else."""
        drafts = input_batch.num_draft_tokens_per_req
        if drafts is None or input_batch.num_draft_tokens == 0:
            return None
        rows = int(drafts[0]) + 1
        covered = (
            rows in self.cu_rows
            and input_batch.num_tokens == input_batch.num_reqs * rows
            and bool((drafts == rows - 1).all())
        )
        return rows if covered else None

    def _is_static(self, hidden_states: torch.Tensor) -> bool:
        return hidden_states.data_ptr() == self.hidden_states.data_ptr()

    def _graph(self, num_reqs: int, rows: int) -> tuple[int, int, Callable[[], None]] | None:
        """Padded size, rows and replay of the graph for so many trees of so many rows."""
        manager = self.runner.speculator.step_graphs
        if manager is None:
            return None
        desc = manager.dispatch(num_reqs, num_reqs * rows, rows, 0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return None
        return desc.num_reqs, rows, lambda: manager.run_fullgraph(desc)

    def _smallest_graph(
        self, input_batch: InputBatch
    ) -> tuple[int, int, Callable[[], None]] | None:
        """The graph with fewest rows that every request's rows fit into."""
        most = int(np.diff(input_batch.cu_num_logits_np).max())
        fitting = (rows for rows in sorted(self.cu_rows) if rows >= most)
        graphs = (self._graph(input_batch.num_reqs, rows) for rows in fitting)
        return next((graph for graph in graphs if graph is not None), None)

    def _lay_out(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, rows: int
    ) -> torch.Tensor:
        """Place the batch's rows of logits as trees of ``rows`` rows where the graph reads them.

        A prompt's last row becomes the root of a tree without nodes; missing rows repeat the
        request's last one and hold no token, so that the walk ends above them.

        Returns
        -------
        torch.Tensor, [num_reqs] int32
            Rows that each request misses.
        """
        runner, num_reqs = self.runner, input_batch.num_reqs
        buffers, end = runner.input_buffers, num_reqs * rows
        starts, ends = (input_batch.cu_num_logits[i : i + num_reqs] for i in (0, 1))
        # [R, rows]: place among the rows of logits
        places = starts[:, None] + torch.arange(rows, device=starts.device)
        is_row = places < ends[:, None]
        source = input_batch.logits_indices[torch.minimum(places, ends[:, None] - 1)].flatten()
        self.hidden_states[:end].copy_(hidden_states[source])
        buffers.positions[:end].copy_(buffers.positions[source])
        tokens = buffers.input_ids[source].masked_fill_(~is_row.flatten(), -1)
        buffers.input_ids[:end].copy_(tokens)
        # The walk counts a tree's rows as the query. Those before them are computed too, and
        # missing ones are not: it takes them for rejected unless all lie inside the prompt.
        own_rows, slots = ends - starts, input_batch.idx_mapping
        queries = input_batch.query_start_loc[: num_reqs + 1].diff()
        in_prompt = input_batch.seq_lens[:num_reqs] < self.prefill_len[slots]
        counted = torch.where(in_prompt, rows, own_rows)
        runner.req_states.num_computed_tokens.gpu.index_add_(0, slots, queries - counted)
        return rows - own_rows

    def replay_dummy(self, num_reqs: int, rows: int) -> bool:
        """Replay the graph of a batch of padding only, to time it; False where there is none."""
        if self.hidden_states is None or rows not in self.cu_rows:
            return False
        found = self._graph(num_reqs, rows)
        if found is None:
            return False
        self.slots.fill_(-1)
        found[2]()
        return True

    def capture(self, manager: CudaGraphManager, drawn_manager: CudaGraphManager) -> None:
        """Record the step, whole and behind the draw, for every size of the managers.

        All rows are padding meanwhile.
        """
        runner, sampler = self.runner, self.runner.sampler
        if sampler.compute_nans or sampler.trace_replay_state is not None or runner.batch_sharder:
            return
        self.hidden_states = runner.cudagraph_manager.hidden_states
        if self.hidden_states is None:
            return
        self.slots.fill_(-1)

        def create(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            rows = desc.num_tokens // desc.num_reqs
            return lambda mode: self.compute(self.hidden_states, desc.num_reqs, rows)

        manager.capture(create, progress_bar_desc="Capturing Medusa verification graphs")
        self.drawn_step.capture(drawn_manager)

    def compute(self, hidden_states: torch.Tensor, num_reqs: int, rows: int) -> None:
        """The step itself for the first ``num_reqs`` of ``slots``; reads device memory only.

        Parameters
        ----------
        hidden_states : torch.Tensor
            [>= num_reqs * rows, hidden_size] output of the forward pass.
        num_reqs : int
            Requests, padding included.
        rows : int
            Rows (root + nodes) of each.
        """
        hidden_states = hidden_states[: num_reqs * rows]
        logits = self.runner.model.compute_logits(hidden_states)
        drawn = self._draw(logits, self.slots[:num_reqs])
        self.follow(drawn, hidden_states, self.cu_rows[rows][: num_reqs + 1], num_reqs)

    def follow(
        self,
        drawn: torch.Tensor,  # [num_rows] int64, the target's token at every row
        hidden_states: torch.Tensor,  # [num_rows, hidden_size]
        cu_rows: torch.Tensor,  # [num_reqs + 1] int32, first row of each request
        num_reqs: int,
        flat_rows: torch.Tensor | None = None,  # out [num_rows] int64, as the walk's
    ) -> None:
        """What follows from the tokens drawn: the walk and everything after it."""
        runner, slots = self.runner, self.slots[:num_reqs]
        walk = self._outputs(num_reqs, hidden_states, flat_rows)
        tree_walk(
            walk,
            drawn,
            self.row_tokens(drawn, cu_rows, slots),
            runner.input_buffers.positions[: drawn.shape[0]],
            cu_rows,
            runner.input_buffers.seq_lens[:num_reqs],
            slots,
            self.tree_batch.parents,
            self.prefill_len,
            hidden_states=hidden_states,
            state=self._request_state(),
        )
        runner.finish_advance(slots, walk)
        runner.speculator.draft(walk.hidden, slots, self.drafts[:num_reqs])

    def _draw(
        self,
        logits: torch.Tensor,  # [R * rows, vocab_size]
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The target's token at every row, [R * rows] int64."""
        runner, num_logits = self.runner, logits.shape[0]
        return gumbel_sample(
            logits,
            slots[:, None].expand(-1, num_logits // slots.shape[0]).reshape(-1),
            self.temperature,
            self.seeds,
            runner.input_buffers.positions[:num_logits],
            # Divides as vLLM's temperature kernel does, without a float32 copy of the logits.
            apply_temperature=True,
            is_drafting=False,
            use_fp64=runner.sampler.use_fp64_gumbel,
        )

    def row_tokens(
        self,
        drawn: torch.Tensor,  # [R * rows] int64
        cu_rows: torch.Tensor,  # [R + 1] int32
        slots: torch.Tensor,  # [R] int64
    ) -> torch.Tensor:
        """Token that the walk takes each row for, [R * rows] int32."""
        return self.runner.input_buffers.input_ids[: drawn.shape[0]]

    def _outputs(
        self, num_reqs: int, hidden_states: torch.Tensor, flat_rows: torch.Tensor | None
    ) -> WalkOutput:
        """Where the walk writes: tokens and counts into the step's output, the rest anew."""
        tokens, counts = self._views(self.output, num_reqs)
        made = WalkOutput.empty(num_reqs, 0, self.width, hidden_states.device)
        return made._replace(
            tokens=tokens,
            num_sampled=counts[0],
            num_rejected=counts[1],
            flat_rows=flat_rows,
            hidden=hidden_states.new_empty(num_reqs, hidden_states.shape[1]),
        )

    def _request_state(self) -> RequestState:
        """What vLLM's ``postprocess_sampled`` would advance."""
        states = self.runner.req_states
        return RequestState(
            num_computed_tokens=states.num_computed_tokens.gpu,
            last_sampled=states.last_sampled_tokens.view(-1),
            total_len=states.total_len.gpu,
            all_token_ids=states.all_token_ids.gpu,
            output_counts=self.runner.sampler.penalties_state.output_bin_counts,
        )

    def _views(self, output: torch.Tensor, num_reqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [R, W] int64 and counts [2, R] int32 inside an output buffer."""
        end = num_reqs * self.width
        counts = output[end : end + num_reqs].view(torch.int32).view(2, num_reqs)
        return output[:end].view(num_reqs, self.width), counts
