"""Which implementation of a tree operation runs: Triton on a GPU, PyTorch elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The package loads Triton at the first launch, so a machine without it gets this far.
from vllm_medusa import triton_kernels as gpu_kernels
from vllm_medusa.triton_kernels import reference


class WalkOutput(NamedTuple):
    """What a walk over the trees of a batch leaves behind (see ``tree_walk``)."""

    tokens: torch.Tensor  # [num_reqs, num_columns] int64
    num_sampled: torch.Tensor  # [num_reqs] int32
    path_masks: torch.Tensor  # [num_reqs] int64
    last_rows: torch.Tensor  # [num_reqs] int64
    flat_rows: torch.Tensor  # [num_logits] int64

    @classmethod
    def empty(
        cls, num_reqs: int, num_logits: int, num_columns: int, device: torch.device
    ) -> WalkOutput:
        """Allocate outputs of ``num_reqs`` walks over ``num_logits`` rows."""

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            empty(num_reqs, num_columns),
            empty(num_reqs, dtype=torch.int32),
            empty(num_reqs),
            empty(num_reqs),
            empty(num_logits),
        )


def _implementation(tensor: torch.Tensor):
    return gpu_kernels if tensor.is_cuda else reference


def tree_walk(
    drawn: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_num_logits: torch.Tensor,
    parents: torch.Tensor,
    idx_mapping: torch.Tensor,
    accept_limits: torch.Tensor,
    *,
    out: WalkOutput,
) -> WalkOutput:
    """Run a walk into ``out`` and return it; arguments as in the kernel's launcher."""
    _implementation(drawn).tree_walk(
        drawn, draft_tokens, cu_num_logits, parents, idx_mapping, accept_limits, *out
    )
    return out


def scatter_tree(positions: torch.Tensor, *args) -> None:
    """Positions and masks of tree rows; arguments as in the kernel's launcher."""
    _implementation(positions).scatter_tree(positions, *args)
