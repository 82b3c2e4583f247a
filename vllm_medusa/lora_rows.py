"""LoRA adapters beside a token tree: which adapter each row of logits belongs to.

vLLM's V2 runner tells the lm_head of one row a request; a tree has one a node.  And the
heads were trained on the plain base, whose lm_head they share: for them it goes without
the adapters' part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState

from vllm_medusa.tree_batch import TreeBatch


def spread_over_rows(adapters: Sequence[int], num_rows: np.ndarray) -> tuple[int, ...]:
    """Adapter of every row of logits.

    Parameters
    ----------
    adapters : sequence of int
        [num_reqs], in batch order.
    num_rows : numpy.ndarray
        [num_tree_reqs], rows of the leading requests, which verify trees; others have one.

    Examples
    --------
    >>> spread_over_rows((7, 0, 8), np.array([3, 2]))
    (7, 7, 7, 0, 0, 8)
    """
    counts = np.ones(len(adapters), dtype=np.int64)
    counts[: len(num_rows)] = num_rows
    return tuple(np.repeat(np.asarray(adapters), counts).tolist())


class TreeLoraState(LoraState):
    """vLLM's own, for batches whose leading requests have several rows of logits."""

    def __init__(self, max_num_reqs: int, tree_batch: TreeBatch):
        super().__init__(max_num_reqs)
        self.tree_batch = tree_batch

    def make_lora_inputs(
        self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[LoRARequest]]:
        """Adapters by row of logits, by token, and those in use."""
        per_request, per_token, active = super().make_lora_inputs(
            req_ids, idx_mapping, num_scheduled_tokens
        )
        batch = self.tree_batch
        per_row = spread_over_rows(per_request, batch.num_rows_np[: batch.num_tree_reqs])
        return per_row, per_token, active


class _NoAdapters:
    """Stands in for vLLM's adapter products where there is to be none."""

    @staticmethod
    def add_lora_logits(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return logits


@contextlib.contextmanager
def _without_adapters(layers: list[LogitsProcessorWithLoRA]) -> Iterator[None]:
    wrappers = [layer.punica_wrapper for layer in layers]
    for layer in layers:
        layer.punica_wrapper = _NoAdapters
    try:
        yield
    finally:
        for layer, wrapper in zip(layers, wrappers, strict=True):
            layer.punica_wrapper = wrapper


def base_logits(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """``model.compute_logits`` of the base model, whatever adapters are loaded."""
    layers = [m for m in model.modules() if isinstance(m, LogitsProcessorWithLoRA)]

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        with _without_adapters(layers):
            return model.compute_logits(hidden)

    return compute_logits
