"""Acceptance that is drawn: every step costs what it costs, but chance decides which drafts stand.

Between the sampler's draw and the tree walk one number per row decides which of its children is
right, each with the share that the tree's frequencies give it, or none.  The row's drawn token
becomes that child's, and the other children lose theirs, so that the walk cannot take them.  The
output is no text of the model; only the time of a step and the tokens that it yields mean anything.
"""

from __future__ import annotations

from typing import Any

import torch
from synthetic_children import child_ranges, draw_children

from vllm_medusa.verification_step import VerificationStep
from vllm_medusa.verifier import TreeVerifier


class SyntheticDraws:
    """What a runner's tree promises, drawn.

    Parameters
    ----------
    runner : TreeRunnerMixin

    Raises
    ------
    ValueError
        A tree without frequencies, trees chosen at every step, or typical acceptance.
    """

    def __init__(self, runner: Any):
        config = runner.speculative_config
        reason = None
        if config.dynamic_tree:
            reason = 'needs one tree for all requests; leave "tree": "dynamic" out'
        elif config.acceptance != "exact":
            reason = "decides itself what is accepted; leave acceptance out"
        elif not config.node_frequencies:
            reason = 'needs what the tree promises; add "adaptive": true and a calibrated tree'
        if reason is not None:
            raise ValueError(f"synthetic acceptance {reason}")
        batch = runner.tree_batch
        low, high = child_ranges(batch.tree, config.node_frequencies)
        self.promise = 1 + sum(config.node_frequencies)
        self.parents = batch.parents
        self.seeds = runner.sampler.sampling_states.seeds
        self.lowest, self.highest = (
            torch.tensor(values, dtype=torch.int64, device=batch.device) for values in (low, high)
        )

    def __call__(
        self,
        drawn: torch.Tensor,  # [num_logits] int64, in place
        tokens: torch.Tensor,  # [num_logits]
        positions: torch.Tensor,  # [num_logits] int64
        cu_rows: torch.Tensor,  # [R + 1] int32
        slots: torch.Tensor,  # [R] int64
        seeds: torch.Tensor | None = None,  # where a graph reads them
    ) -> torch.Tensor:
        """Choose right children; tokens as the walk has to read them, [num_logits]."""
        out = torch.empty_like(tokens)
        seeds = self.seeds.gpu if seeds is None else seeds
        draw_children(
            out, drawn, tokens, positions, cu_rows, slots, seeds, self.parents,
            self.lowest, self.highest,
        )  # fmt: skip
        return out


class SyntheticVerifier(TreeVerifier):
    """Verification launch by launch."""

    draws: SyntheticDraws | None = None

    def _walk(self, rows, tokens, positions, input_batch):
        """Walk what was drawn here instead."""
        slots, cu_rows = input_batch.idx_mapping, input_batch.cu_num_logits
        tokens = self.draws(rows.drawn, tokens, positions, cu_rows, slots)
        return super()._walk(rows._replace(scores=None), tokens, positions, input_batch)


class SyntheticStep(VerificationStep):
    """Verification as one graph."""

    def __init__(self, runner: Any):
        super().__init__(runner)
        runner.rejection_sampler.draws = self.draws = SyntheticDraws(runner)

    def row_tokens(self, drawn, cu_rows, slots):
        """Tokens of the right nodes only."""
        tokens = super().row_tokens(drawn, cu_rows, slots)
        positions = self.runner.input_buffers.positions[: drawn.shape[0]]
        return self.draws(drawn, tokens, positions, cu_rows, slots, self.seeds)
