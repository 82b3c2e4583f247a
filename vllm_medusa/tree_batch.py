"""The trees of the current batch, in buffers that keep their address between steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_medusa.tree import TokenTree
from vllm_medusa.triton_kernels.attention_plan import MOST_COUNTERS


class TreeBatch:
    """Per-request trees and their gathered form for one step.

    Tables are indexed by vLLM's request slot: every request has a tree of its own, the
    start-up tree unless trees are chosen step by step (see :mod:`vllm_medusa.dynamic_tree`).

    Attributes
    ----------
    parents, depths : torch.Tensor, [max_num_reqs, W] int32
        Row -> parent row (-1 at the root), row -> depth; W = nodes + 1.
    masks : torch.Tensor, [max_num_reqs, W] int64, or [max_num_reqs, 2, W] for W > 64
        Bit j % 64 of row i's word j // 64: row j is row i or one of its ancestors.
    fixed_slots : torch.Tensor, [max_num_reqs] int32
        Not 0: the request in this slot keeps the start-up tree where others choose theirs.
    row_counts : tuple of int
        Rows that uniform decode batches have: W, and what the schedule cuts it to.
    step_masks : torch.Tensor, like ``masks``
        ``masks`` in batch order; what attention reads, also inside CUDA graphs.
    attention_counters : torch.Tensor, [MOST_COUNTERS] int32
        Zeros between launches of the tree kernel, at one address for all CUDA graphs.
    num_tree_reqs : int
        Leading requests of the batch whose query is a tree.
    num_tree_rows : int
        Rows of all of them.
    num_rows_np : numpy.ndarray, [num_tree_reqs] int32
        Rows (root + nodes) of each.
    tree_starts, rest_starts : torch.Tensor, [max_num_reqs + 1] int32
        Where queries begin for the kernel of the trees and for that of the other requests: each
        has no rows for the requests of the other. Up to date in steps that need both.
    in_mixed_graph : bool
        Whether this step's forward pass is a graph that takes any batch.
    last_rows : torch.Tensor or None, [num_reqs] int64
        Logits row that ends each request's accepted path; None: one row a request.
    drafts : torch.Tensor or None, [num_reqs, W - 1] int64
        Next drafts, when the whole step was one graph: requests and KV cache are then
        already advanced.
    """

    def __init__(
        self,
        tree: TokenTree,
        max_num_reqs: int,
        device: torch.device,
        row_counts: tuple[int, ...] = (),
    ):
        self.tree = tree
        self.device = device
        self.row_counts = row_counts or (tree.num_rows,)

        def table(row: Sequence[int] | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            one = torch.tensor(row, dtype=dtype, device=device)
            return one.expand(max_num_reqs, *one.shape).contiguous()

        self.parents = table(tree.parents, torch.int32)
        self.depths = table(tree.depths, torch.int32)
        self.masks = table(tree.mask_words(), torch.int64)
        self.fixed_slots = torch.ones(max_num_reqs, dtype=torch.int32, device=device)
        self.step_masks = self.masks.clone()
        self.attention_counters = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
        self.tree_starts, self.rest_starts = torch.zeros(
            2, max_num_reqs + 1, dtype=torch.int32, device=device
        )
        self.in_mixed_graph = False
        self.num_tree_reqs = self.num_tree_rows = 0
        self.num_rows_np = np.empty(0, dtype=np.int32)
        self.last_rows: torch.Tensor | None = None
        self.drafts: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """W: rows of the largest tree, root included."""
        return self.tree.num_rows

    def is_tree(self, num_rows: int) -> bool:
        """Whether uniform decode queries of this length are trees with at least one node."""
        return num_rows > 1 and num_rows in self.row_counts

    def keep_tree(self, slot: int, fixed: bool) -> None:
        """Note whether the request in ``slot`` keeps the start-up tree at every step."""
        self.fixed_slots[slot] = int(fixed)

    def begin_step(self, input_batch: InputBatch) -> None:
        """Gather masks in batch order and turn linear positions of tree rows into depths.

        vLLM sorts requests with drafts to the front and places a request's rows at
        the end of its query, root first.
        """
        self.last_rows = self.drafts = None
        drafts = input_batch.num_draft_tokens_per_req
        has_trees = drafts is not None and input_batch.num_draft_tokens > 0
        self.num_tree_reqs = int(np.count_nonzero(drafts)) if has_trees else 0
        if self.in_mixed_graph or 0 < self.num_tree_reqs < input_batch.num_reqs:
            num_rows = int(input_batch.query_start_loc_np[self.num_tree_reqs])
            self.split_rows(input_batch.query_start_loc, num_rows)
        if has_trees:
            self.num_rows_np = drafts[: self.num_tree_reqs] + 1
            self.place_rows(input_batch.positions, input_batch)

    def split_rows(self, query_start_loc: torch.Tensor, num_tree_rows: int) -> None:
        """Write where queries begin for each kernel; ``query_start_loc`` is [num_reqs + 1]."""
        self.num_tree_rows, end = num_tree_rows, len(query_start_loc)
        torch.clamp(query_start_loc, max=num_tree_rows, out=self.tree_starts[:end])
        torch.clamp(query_start_loc, min=num_tree_rows, out=self.rest_starts[:end])

    def place_rows(self, positions: torch.Tensor, input_batch: InputBatch) -> None:
        """Turn the linear ``positions`` [num_tokens] of this step's tree rows into depths."""
        from vllm_medusa.kernels import scatter_tree

        scatter_tree(
            positions,
            self.step_masks,
            input_batch.query_start_loc,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.depths,
            self.masks,
            self.num_tree_reqs,
        )

    def begin_dummy_step(self, input_batch: InputBatch) -> None:
        """Treat a dummy batch of whole or cut trees as such, any other as plain."""
        self.last_rows = self.drafts = None
        self.in_mixed_graph = False
        rows = int(input_batch.num_scheduled_tokens[0])
        uniform = bool((input_batch.num_scheduled_tokens == rows).all())
        self.num_tree_reqs = input_batch.num_reqs if uniform and self.is_tree(rows) else 0
        self.num_rows_np = input_batch.num_scheduled_tokens[: self.num_tree_reqs]
