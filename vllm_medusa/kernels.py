"""Which implementation of a tree operation runs: Triton on a GPU, PyTorch elsewhere."""

from __future__ import annotations

import torch

# The package loads Triton at the first launch, so a machine without it gets this far.
from vllm_medusa import triton_kernels as gpu_kernels
from vllm_medusa.triton_kernels import reference
from vllm_medusa.triton_kernels.draft_workspace import DraftWorkspace
from vllm_medusa.triton_kernels.lookup_types import MAX_MATCH, Chains, LookupWorkspace
from vllm_medusa.triton_kernels.noise_types import DrawNoise
from vllm_medusa.triton_kernels.tree_types import Candidates, FixedTree, TreeTables
from vllm_medusa.triton_kernels.walk_types import RequestState, WalkOutput

__all__ = [
    "MAX_MATCH",
    "Candidates",
    "Chains",
    "DraftWorkspace",
    "DrawNoise",
    "FixedTree",
    "LookupWorkspace",
    "RequestState",
    "TreeTables",
    "WalkOutput",
    "add_update",
    "best_tree",
    "draft_tree",
    "embed_paths",
    "float8_product",
    "lookup_chain",
    "scatter_tree",
    "top_tokens",
    "tree_walk",
]


def _implementation(tensor: torch.Tensor):
    return gpu_kernels if tensor.is_cuda else reference


def tree_walk(out: WalkOutput, sampled: torch.Tensor, *args, **kwargs) -> None:
    """Accepted path of every request; arguments as in the kernel's launcher."""
    _implementation(sampled).tree_walk(out, sampled, *args, **kwargs)


def draft_tree(out: torch.Tensor, logits: torch.Tensor, *args, **kwargs) -> None:
    """Draft token of every node; arguments as in the kernel's launcher."""
    _implementation(logits).draft_tree(out, logits, *args, **kwargs)


def top_tokens(tokens: torch.Tensor, *args, **kwargs) -> None:
    """Best tokens of every head, with log probabilities; arguments as in the kernel's launcher."""
    _implementation(tokens).top_tokens(tokens, *args, **kwargs)


def best_tree(out: torch.Tensor, *args, **kwargs) -> None:
    """Likeliest nodes of every request as its tree; arguments as in the kernel's launcher."""
    _implementation(out).best_tree(out, *args, **kwargs)


def lookup_chain(chain: torch.Tensor, *args, **kwargs) -> None:
    """What followed a request's newest tokens before; arguments as in the kernel's launcher."""
    _implementation(chain).lookup_chain(chain, *args, **kwargs)


def scatter_tree(positions: torch.Tensor, *args) -> None:
    """Positions and masks of tree rows; arguments as in the kernel's launcher."""
    _implementation(positions).scatter_tree(positions, *args)


def embed_paths(out: torch.Tensor, *args) -> None:
    """What sequential heads read at each parent; arguments as in the kernel's launcher."""
    _implementation(out).embed_paths(out, *args)


def add_update(out: torch.Tensor, *args) -> None:
    """End of a residual layer of sequential heads; arguments as in the kernel's launcher."""
    _implementation(out).add_update(out, *args)


def float8_product(out: torch.Tensor, *args, **kwargs) -> None:
    """Product with float8 weights; arguments as in the kernel's launcher, but no plan elsewhere."""
    _implementation(out).float8_product(out, *args, **kwargs)
