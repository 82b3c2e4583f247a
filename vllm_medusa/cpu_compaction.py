"""After acceptance on a CPU: cache rows of the accepted path move behind their root.

In vLLM's CPU cache a row's key is a column of its block, its value a row (see
:mod:`vllm_medusa.cpu_attention`).
"""

from __future__ import annotations

import math

import numpy as np
import torch

# Key elements moved by one operation: a few rows move in all layers at once, many go in a
# few layers at a time, which stay in the second-level cache between reading and writing.
# 30 layers on Zen 3: 0.35 ms at batch 1 (0.66 ms layer by layer), 6.7 ms at batch 32
# (7.8 ms in one pass).
KEYS_PER_PASS = 1 << 14


class CPUKVCompactor:
    """Moves rows of the layers of one KV cache group.

    Parameters
    ----------
    kv_caches : list of torch.Tensor, each [num_blocks, num_kv_heads, block_size, 2 * head_size]
        Every layer's cache, in the layout of vLLM's "vec" kernels; each block one run of
        memory.
    """

    def __init__(self, kv_caches: list[torch.Tensor]):
        first = kv_caches[0]
        for index, cache in enumerate(kv_caches):
            same = cache.shape == first.shape and cache.stride() == first.stride()
            if not same or not cache[0].is_contiguous():
                raise ValueError(
                    f"kv_caches[{index}] must hold contiguous blocks and look like the first "
                    f"({tuple(first.shape)}, strides {first.stride()}), found shape "
                    f"{tuple(cache.shape)}, strides {cache.stride()}"
                )
        _, num_kv_heads, self.block_size, width = first.shape
        size = self.head_size = width // 2
        self.block_stride = first.stride(0)
        self.stacks = _stacks(kv_caches)
        heads = np.arange(num_kv_heads)[:, None] * (2 * self.block_size * size)
        self.first_keys = (heads + np.arange(size) * self.block_size).ravel()
        # Values move as pieces: whole rows, unless padding between blocks shifts them.
        self.piece = math.gcd(size, self.block_stride)
        values = heads + self.block_size * size + np.arange(0, size, self.piece)
        self.first_values = values.ravel()

    def __call__(
        self,
        block_table: torch.Tensor,  # [max_num_reqs, max_blocks] int32
        idx_mapping: torch.Tensor,  # [num_reqs] int64, row of block_table, -1: skip
        root_positions: torch.Tensor,  # [num_reqs] int64
        path_masks: torch.Tensor,  # [num_reqs] or [num_reqs, 2] int64
    ) -> None:
        """Move the row at ``root + b_j`` to ``root + j`` for the set bits ``b_j`` of the path.

        Parameters
        ----------
        block_table : torch.Tensor, [max_num_reqs, max_blocks] int32
        idx_mapping : torch.Tensor, [num_reqs] int64
            Row of ``block_table`` of each request; -1 leaves a request alone.
        root_positions : torch.Tensor, [num_reqs] int
            Position of each request's root row.
        path_masks : torch.Tensor, [num_reqs] int64, or [num_reqs, 2] for more than 64 rows
            Bit b: row b was accepted. Bit 0 is the root.

        Examples
        --------
        A root at position 100 with path mask 0b10101 keeps row 0, moves the row at
        102 to 101 and the row at 104 to 102.
        """
        moves = _moves(idx_mapping.numpy(), root_positions.numpy(), path_masks.numpy())
        if moves is None:
            return
        requests, positions = moves
        blocks = block_table.numpy()[requests, positions // self.block_size].astype(np.int64)
        starts = (blocks * self.block_stride)[..., None]
        slots = (positions % self.block_size)[..., None]
        keys = starts + slots + self.first_keys
        values = (starts + slots * self.head_size + self.first_values) // self.piece
        keys, values = (torch.from_numpy(index.reshape(2, -1)) for index in (keys, values))
        layers = max(1, KEYS_PER_PASS // keys.shape[1])
        for stack in self.stacks:
            for elements in stack.split(layers):
                elements.index_copy_(1, keys[1], elements.index_select(1, keys[0]))
            pieces = stack.unflatten(1, (-1, self.piece))
            pieces.index_copy_(1, values[1], pieces.index_select(1, values[0]))


def _stacks(kv_caches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The layers as [num_layers, num_elements] views, one per run of layers at equal distances.

    vLLM cuts all layers out of one allocation. Blocks may be padded, so an element axis
    reaches from the first to the last element of a layer.
    """
    first = kv_caches[0]
    span = (first.shape[0] - 1) * first.stride(0) + first[0].numel()
    starts = [cache.data_ptr() // first.element_size() for cache in kv_caches]
    storages = {cache.untyped_storage().data_ptr() for cache in kv_caches}
    distances = set(np.diff(starts).tolist())
    if len(kv_caches) > 1 and len(storages) == len(distances) == 1 and min(distances) > 0:
        return [first.as_strided((len(kv_caches), span), (distances.pop(), 1))]
    return [cache.as_strided((1, span), (span, 1)) for cache in kv_caches]


def _moves(
    slots: np.ndarray, roots: np.ndarray, path_masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Table row of each cache row that changes place [num_moves], its source and target [2, ..]."""
    words = path_masks.reshape(len(path_masks), -1, 1)
    bits = ((words >> np.arange(64)) & 1).astype(bool).reshape(len(path_masks), -1)
    ranks = bits.cumsum(1) - 1
    moved = bits & (ranks != np.arange(bits.shape[1])) & (slots >= 0)[:, None]
    requests, rows = moved.nonzero()
    if not len(requests):
        return None
    roots = roots[requests].astype(np.int64)
    return slots[requests], np.stack([roots + rows, roots + ranks[requests, rows]])
