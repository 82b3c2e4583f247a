"""Tree attention in one call a layer, where the kernels of ``cpu_rows.cpp`` are at hand.

Covers float32 without sliding window, soft cap and sinks; the rest goes the way of
:mod:`vllm_medusa.cpu_attention`.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from vllm_medusa.cpu_rows import PANEL, RowKernels


class TreeStep:
    """One step's tree requests as the kernel reads them.

    Parameters
    ----------
    starts : numpy.ndarray, [num_reqs + 1] int32
        First query row of each request.
    seq_lens : numpy.ndarray, [num_reqs] int32
        Keys of each request, its tree's rows included.
    block_table : numpy.ndarray, [>= num_reqs, max_blocks] int32
    masks : numpy.ndarray, [>= num_reqs, W] int64, or [>= num_reqs, 2, W] for W > 64
        Bit j % 64 of word i in part j // 64: row i sees row j.
    num_kv_heads, group, head_size, block_size : int
        ``group`` query heads read one KV head.
    """

    def __init__(
        self,
        starts: np.ndarray,
        seq_lens: np.ndarray,
        block_table: np.ndarray,
        masks: np.ndarray,
        *,
        num_kv_heads: int,
        group: int,
        head_size: int,
        block_size: int,
    ):
        # Held, because the kernel is given their addresses.
        self.arrays = [
            np.ascontiguousarray(array, dtype)
            for array, dtype in (
                (starts, np.int32),
                (seq_lens, np.int32),
                (block_table, np.int32),
                (masks, np.int64),
            )
        ]
        num_reqs = len(self.arrays[1])
        self.words = np.array(
            [
                *(array.ctypes.data for array in self.arrays),
                *(num_reqs, self.arrays[2].shape[1]),
                *(math.prod(masks.shape[1:]), masks.shape[-1]),
                *(num_kv_heads, group, head_size, block_size),
            ],
            dtype=np.int64,
        )
        self.address = self.words.ctypes.data


def can_attend(dtype: torch.dtype, head_size: int, block_size: int) -> bool:
    """Whether the kernel reads such a cache."""
    return dtype == torch.float32 and head_size % PANEL == 0 and block_size % PANEL == 0


def tree_attention(
    kernels: RowKernels,
    output: torch.Tensor,  # [>= num_tokens, num_heads, head_size] float32, contiguous
    query: torch.Tensor,  # [>= num_tokens, num_heads, head_size] float32
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    step: TreeStep,
    scale: float,
) -> None:
    """Attention of the tree rows, written to the leading rows of ``output``."""
    kernels.tree_attention(
        step.address,
        query.data_ptr(),
        query.stride(0),
        kv_cache.data_ptr(),
        kv_cache.stride(0),
        scale,
        output.data_ptr(),
    )
