"""Gives every request the best tree among candidate paths, by the step's own probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_medusa.kernels import Candidates, FixedTree, TreeTables, best_tree
from vllm_medusa.prompt_lookup import PromptLookup
from vllm_medusa.tree_batch import TreeBatch


class TreeChooser:
    """Chooses trees; all tables are built once, so ``choose`` copies nothing.

    Parameters
    ----------
    tree_batch : TreeBatch
        Whose tables the trees are written to; requests that it calls fixed keep its tree.
    columns, ancestors : numpy.ndarray, [depth, num_candidates] int32
        Candidate paths, as :func:`vllm_medusa.tree_candidates.candidate_tables` makes them.
    fixed_columns : sequence of int, [num_nodes]
        Column of every node of the fixed tree.
    lookup : PromptLookup, optional
        Proposes one more path of every request.
    """

    def __init__(
        self,
        tree_batch: TreeBatch,
        columns: np.ndarray,
        ancestors: np.ndarray,
        fixed_columns: Sequence[int],
        lookup: PromptLookup | None = None,
    ):
        device, (max_num_reqs, num_rows) = tree_batch.device, tree_batch.parents.shape
        self.lookup = lookup
        self.candidates = Candidates(
            torch.from_numpy(columns).to(device), torch.from_numpy(ancestors).to(device)
        )
        self.tables = TreeTables(tree_batch.parents, tree_batch.depths, tree_batch.masks)
        self.fixed = FixedTree(
            tree_batch.fixed_slots,
            torch.tensor(fixed_columns, dtype=torch.int32, device=device),
            # Row 0 of any slot: no tree was chosen yet.
            *(table[0].clone() for table in self.tables),
        )
        self.scratch = torch.empty(
            max_num_reqs * (num_rows - 1), dtype=torch.int32, device=device
        )

    def choose(
        self,
        out: torch.Tensor,  # [num_reqs, num_nodes] int64
        tokens: torch.Tensor,  # [>= num_reqs, depth, T] int64
        log_probs: torch.Tensor,  # [>= num_reqs, depth, T] float32
        slots: torch.Tensor,  # [num_reqs] int64, negative: no request
    ) -> None:
        """Write every request's next tree into its slot's tables, and its drafts to ``out``."""
        best_tree(
            out,
            self.tables,
            tokens,
            log_probs,
            slots,
            self.candidates,
            self.fixed,
            chains=None if self.lookup is None else self.lookup.find(slots),
            scratch=self.scratch,
        )
