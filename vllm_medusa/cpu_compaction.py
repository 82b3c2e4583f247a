"""After acceptance on a CPU: cache rows of the accepted path move behind their root.

In vLLM's CPU cache a row's key is a column of its block, its value a row (see
:mod:`vllm_medusa.cpu_attention`).
"""

from __future__ import annotations

import numpy as np
import torch


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
        num_blocks, self.num_kv_heads, self.block_size, width = first.shape
        self.head_size = width // 2
        self.block_stride = first.stride(0)
        # Blocks may be padded: one axis over all elements from the first to the last.
        span = (num_blocks - 1) * self.block_stride + first[0].numel()
        self.flat = [cache.as_strided((span,), (1,)) for cache in kv_caches]

    def __call__(
        self,
        block_table: torch.Tensor,  # [max_num_reqs, max_blocks] int32
        idx_mapping: torch.Tensor,  # [num_reqs] int64, row of block_table, -1: skip
        root_positions: torch.Tensor,  # [num_reqs] int64
        path_masks: torch.Tensor,  # [num_reqs] int64
    ) -> None:
        """Move the row at ``root + b_j`` to ``root + j`` for the set bits ``b_j`` of the path.

        Parameters
        ----------
        block_table : torch.Tensor, [max_num_reqs, max_blocks] int32
        idx_mapping : torch.Tensor, [num_reqs] int64
            Row of ``block_table`` of each request; -1 leaves a request alone.
        root_positions : torch.Tensor, [num_reqs] int
            Position of each request's root row.
        path_masks : torch.Tensor, [num_reqs] int64
            Bit b: row b was accepted. Bit 0 is the root.

        Examples
        --------
        A root at position 100 with path mask 0b10101 keeps row 0, moves the row at
        102 to 101 and the row at 104 to 102.
        """
        moves = _moves(idx_mapping.numpy(), root_positions.numpy(), path_masks.numpy())
        if moves is None:
            return
        slots, sources, targets = moves
        table = block_table.numpy()
        source = self._elements(table, slots, sources)
        target = self._elements(table, slots, targets)
        for layer in self.flat:
            layer.index_copy_(0, target, layer.index_select(0, source))

    def _elements(
        self, table: np.ndarray, slots: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        """Offsets of the rows' keys and values within a layer, [num_moves * 2 * H * D] int64."""
        size, block_size = self.head_size, self.block_size
        blocks = table[slots, positions // block_size].astype(np.int64)
        slot = (positions % block_size)[:, None, None]
        heads = np.arange(self.num_kv_heads) * (2 * block_size * size)
        starts = (blocks[:, None] * self.block_stride + heads)[:, :, None]
        keys = starts + np.arange(size) * block_size + slot
        values = starts + block_size * size + slot * size + np.arange(size)
        return torch.from_numpy(np.concatenate([keys.ravel(), values.ravel()]))


def _moves(
    slots: np.ndarray, roots: np.ndarray, path_masks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(table row, source, target) of each row that changes place, request after request."""
    bits = ((path_masks[:, None] >> np.arange(64)) & 1).astype(bool)
    ranks = bits.cumsum(1) - 1
    moved = bits & (ranks != np.arange(64)) & (slots >= 0)[:, None]
    requests, rows = moved.nonzero()
    if not len(requests):
        return None
    roots = roots[requests].astype(np.int64)
    return slots[requests], roots + rows, roots + ranks[requests, rows]
