"""Heads under tensor parallelism: every rank scores its part of the vocabulary.

- An own or common lm_head is cut along the vocabulary, one even slice a rank; a draft
  vocabulary's rows of the target's lm_head are dealt out anew, because its first ids would
  all lie with rank 0.
- A shared lm_head is the target's own shard.
- Residual blocks are cut along their output, like vLLM's column-parallel layers: at 8192
  columns five heads take 671 MB that every rank would read each step; what the all-gather of
  [R, K, hidden] moves instead is 82 kB a request.
- Of its logits a rank sends the best ``num_top`` per head, eight bytes each, never the logits.

All ranks merge the same numbers, so they draft the same tree by construction, and ties go to
the lower id as on one GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_medusa.draft_vocabulary import drafted_ids, floating_lm_head
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.kernels import DraftWorkspace, draft_tree
from vllm_medusa.rank_agreement import all_agree

logger = init_logger(f"vllm.{__name__}")

_LOW_32_BITS = 2**32 - 1
# Below the key of -inf, whatever its id.
_NO_KEY = -(2**63)


def sort_keys(
    values: torch.Tensor,  # any shape, floating point
    ids: torch.Tensor,  # same shape, int64, 0 <= id < 2**32
) -> torch.Tensor:
    """int64 keys in the order of the values, the lower id first among equals; NaN is -inf.

    Examples
    --------
    >>> keys = sort_keys(torch.tensor([2.0, 5.0, 5.0]), torch.tensor([7, 9, 8]))
    >>> ids_of(keys.sort(descending=True).values).tolist()
    [8, 9, 7]
    """
    # Adding zero makes -0 the same number as +0.
    known = torch.where(values.isnan(), float("-inf"), values).float() + 0.0
    bits = known.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW_32_BITS - ids)


def ids_of(keys: torch.Tensor) -> torch.Tensor:
    """The ids that :func:`sort_keys` put into its keys."""
    return _LOW_32_BITS - (keys & _LOW_32_BITS)


def even_slice(size: int, rank: int, world_size: int) -> slice:
    """Part of ``range(size)`` that a rank holds; the last ranks may hold less, or nothing.

    Examples
    --------
    >>> [even_slice(5, rank, 3) for rank in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    share = -(-size // world_size)
    return slice(min(rank * share, size), min((rank + 1) * share, size))


class ShardedDraft:
    """Fills static trees from heads of which this rank holds a part.

    Parameters
    ----------
    heads : MedusaHeads
        This rank's part.
    ids : slice
        Which ids of the heads' vocabulary it scores.
    token_map : torch.Tensor or None
        [1 or num_heads, output_size] int64 of the whole vocabulary, on every rank.
    apply_lm_head : callable or None
        This rank's part of the target's lm_head, for heads without one.
    """

    def __init__(
        self,
        heads: MedusaHeads,
        ids: slice,
        token_map: torch.Tensor | None = None,
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.heads, self.ids, self.token_map = heads, ids, token_map
        self.apply_lm_head = apply_lm_head
        self.workspace: DraftWorkspace | None = None

    def allocate(self, max_num_reqs: int, num_top: int) -> None:
        """Allocate what :meth:`draft` works in, for trees of up to ``num_top`` ranks."""
        device, size = self.heads.weight.device, self.ids.stop - self.ids.start
        num_rows = max_num_reqs * self.heads.spec.num_heads
        self.num_top, self.num_own = num_top, min(num_top, size)
        self.workspace = DraftWorkspace.allocate(num_rows, max(1, size), device)
        self.columns = torch.arange(self.num_own, device=device)
        if self.token_map is not None:
            # Loaded beside the weights, but no buffer of a model: sleep would drop it.
            self.token_map = self.token_map.clone()

    def best_keys(
        self,
        hidden: torch.Tensor,  # [num_reqs, hidden_size]
    ) -> torch.Tensor:
        """This rank's best tokens as :func:`sort_keys`, [num_reqs, num_heads, num_top] int64."""
        num_reqs, num_heads = hidden.shape[0], self.heads.spec.num_heads
        if self.num_own == 0:
            if self.heads.gather_columns is not None:
                self.heads.forward_hidden(hidden)  # the other ranks wait for its columns
            keys = hidden.new_empty(num_reqs, num_heads, 0, dtype=torch.int64)
        else:
            logits = self.heads.draft_logits(hidden, self.apply_lm_head)
            # Matrices of their own leave the heads outside; rows must not be copied.
            by_head = logits.stride(0) < logits.stride(1)
            rows = (logits.transpose(0, 1) if by_head else logits).flatten(0, 1)
            # vLLM pads the last shards of a vocabulary.
            rows = rows[:, : self.ids.stop - self.ids.start]
            best = torch.empty(rows.shape[0], self.num_own, dtype=torch.int64, device=rows.device)
            draft_tree(
                best, rows[:, None], self.columns, num_top=self.num_own, workspace=self.workspace
            )
            keys = sort_keys(rows.gather(1, best), best + self.ids.start)
            if by_head:
                keys = keys.view(num_heads, num_reqs, -1).transpose(0, 1)
            keys = keys.reshape(num_reqs, num_heads, -1)
        missing = self.num_top - self.num_own
        return functional.pad(keys, (0, missing), value=_NO_KEY) if missing else keys.contiguous()

    def draft(
        self,
        out: torch.Tensor,  # [num_reqs, num_nodes] int64
        hidden: torch.Tensor,  # [num_reqs, hidden_size]
        node_columns: torch.Tensor,  # [num_nodes] int64, node -> head * num_top + rank
    ) -> None:
        """Draft token of every node, the same on every rank."""
        # Floats because vLLM's shared-memory gather on CPUs knows no integers; only copied.
        parts = tensor_model_parallel_all_gather(self.best_keys(hidden).view(torch.float32))
        ids = ids_of(parts.view(torch.int64).topk(self.num_top, dim=-1).values)
        if self.token_map is not None:
            ids = self.token_map.expand(*ids.shape[:2], -1).gather(2, ids)
        out.copy_(ids.flatten(1)[:, node_columns])


def shard_heads(
    weights: HeadWeights, target: nn.Module, size: int | None, device: torch.device
) -> ShardedDraft | None:
    """This rank's part of loaded heads; to be called on all ranks.

    Parameters
    ----------
    weights : HeadWeights
        The whole heads, independent ones.
    target : torch.nn.Module
        The loaded model.
    size : int or None
        Ids that heads with a shared lm_head score if the checkpoint names no subset.
    device : torch.device
        Where this rank's part goes.

    Returns
    -------
    ShardedDraft or None
        None where the heads share an lm_head that cannot be read in parts (quantised under a
        vocabulary subset, LoRA adapters, or a model that changes gathered logits): its whole
        logits are gathered then, as for sampling.
    """
    spec = weights.spec
    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    apply_lm_head, token_map = None, weights.token_map
    if spec.own_lm_head:
        ids = even_slice(spec.output_size, rank, world_size)
        weights = _with_part(weights, weights.lm_head[:, ids])
    else:
        drafted = drafted_ids(weights, size)
        lm_head = floating_lm_head(target, spec.hidden_size)
        if drafted is not None and getattr(lm_head, "tp_size", 1) == world_size:
            ids, token_map = even_slice(len(drafted), rank, world_size), drafted[None]
            rows = _dealt_rows(lm_head, drafted, rank, world_size, spec.dtype)
            weights = _with_part(weights, rows[None])
        elif token_map is None and (found := local_lm_head(target, spec, device)):
            apply_lm_head, ids = found
        else:
            logger.info("Medusa: the target's lm_head scores for the heads on all ranks at once")
            return None
    heads = _column_parallel(MedusaHeads.from_weights(weights, "cpu"), rank, world_size).to(device)
    return ShardedDraft(
        heads, ids, None if token_map is None else token_map.to(device), apply_lm_head
    )


def _with_part(weights: HeadWeights, lm_head: torch.Tensor) -> HeadWeights:
    """Heads that score a subset: a rank's part [1 or K, size, width] of their lm_heads."""
    # A rank without rows keeps one that nobody reads.
    lm_head = lm_head if lm_head.shape[1] else lm_head.new_zeros(len(lm_head), 1, lm_head.shape[2])
    spec = dataclasses.replace(
        weights.spec,
        own_lm_head=True,
        common_lm_head=lm_head.shape[0] == 1,
        vocab_subset_size=lm_head.shape[1],
        vocab_subset_per_head=False,
    )
    # Its ids are counted from the slice's begin, see `ShardedDraft.best_keys`.
    ids = torch.arange(lm_head.shape[1])[None]
    return dataclasses.replace(weights, spec=spec, lm_head=lm_head.to(spec.dtype), token_map=ids)


def _dealt_rows(
    lm_head: nn.Module, ids: torch.Tensor, rank: int, world_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Even slice [size, hidden_size] of the target's rows of ``ids`` [n], on the CPU.

    Each row lies with one rank; the others add zeros to it.
    """
    first, weight = lm_head.shard_indices.org_vocab_start_index, lm_head.weight.data
    last = lm_head.shard_indices.org_vocab_end_index
    for part in range(world_size):
        wanted = ids[even_slice(len(ids), part, world_size)].to(weight.device)
        here = (wanted >= first) & (wanted < last)
        rows = weight.new_zeros(len(wanted), weight.shape[1])
        rows[here] = weight[wanted[here] - first]
        if len(wanted):
            rows = tensor_model_parallel_all_reduce(rows)
        if part == rank:
            own = rows.to("cpu", dtype)
    return own


def _gather_columns(part: torch.Tensor) -> torch.Tensor:
    """All ranks' columns, the last dimension; NCCL refuses strided tensors, as products of heads
    before rows are."""
    return tensor_model_parallel_all_gather(part.contiguous())


def _column_parallel(heads: MedusaHeads, rank: int, world_size: int) -> MedusaHeads:
    """Keep this rank's output columns of the residual blocks, where they can be shared out."""
    columns = heads.spec.hidden_size
    if heads.spec.num_layers == 0 or columns % world_size:
        return heads
    own = even_slice(columns, rank, world_size)
    heads.weight = nn.Parameter(heads.weight.data[:, :, own].clone(), requires_grad=False)
    if heads.bias is not None:
        heads.bias = nn.Parameter(heads.bias.data[..., own].clone(), requires_grad=False)
    heads.gather_columns = _gather_columns
    return heads


@contextlib.contextmanager
def _without_gather(processor: LogitsProcessor, seen: list) -> Iterator[None]:
    """While active the model's logits are this rank's; ``seen`` collects its lm_heads."""
    original = processor.forward

    def forward(lm_head, hidden_states, embedding_bias=None, skip_gather=False):
        seen.append(lm_head)
        return original(lm_head, hidden_states, embedding_bias, skip_gather=True)

    processor.forward = forward
    try:
        yield
    finally:
        del processor.forward


@torch.inference_mode()
def local_lm_head(
    target: nn.Module, spec: Any, device: torch.device
) -> tuple[Callable[[torch.Tensor], torch.Tensor], slice] | None:
    """This rank's part of ``target.compute_logits`` and the ids that it scores.

    None on all ranks where it is not, on one of them, a part of the whole logits: some models
    change ids of their own choice after the gather.
    """
    processors = [m for m in target.modules() if isinstance(m, LogitsProcessor)]
    adapted = any(isinstance(m, LogitsProcessorWithLoRA) for m in target.modules())
    if len(processors) != 1 or adapted:
        return None

    def apply(hidden: torch.Tensor, seen: list | None = None) -> torch.Tensor:
        with _without_gather(processors[0], [] if seen is None else seen):
            return target.compute_logits(hidden)

    seen: list = []
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, spec.hidden_size, generator=generator).to(device, spec.dtype)
    whole, own = target.compute_logits(probe), apply(probe, seen)
    if len(seen) != 1 or getattr(seen[0], "tp_size", 1) != get_tensor_model_parallel_world_size():
        return None
    shard = seen[0].shard_indices
    ids = slice(shard.org_vocab_start_index, min(shard.org_vocab_end_index, whole.shape[1]))
    size = max(0, ids.stop - ids.start)
    if not all_agree(torch.equal(own[:, :size], whole[:, ids])):
        return None
    return apply, ids
