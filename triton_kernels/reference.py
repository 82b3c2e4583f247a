"""Plain PyTorch twins of the launchers, same signatures and checks; needs no Triton.

They are written to be read: loops over requests and rows, host reads of device values.
Tests compare the kernels with them, CPU code paths run them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .checks import check_compact_kv, check_scatter_tree, require
from .kv_layout import WORDS, group_layers
from .reference_attention import add_tree_attention, tree_attention
from .reference_draft import best_tree, draft_tree, top_tokens
from .reference_float8 import float8_product
from .reference_lookup import lookup_chain
from .reference_sequential import add_update, embed_paths
from .reference_walk import path_rows, tree_walk

__all__ = [
    "KVCompactor",
    "add_tree_attention",
    "add_update",
    "best_tree",
    "compact_kv",
    "draft_tree",
    "embed_paths",
    "float8_product",
    "lookup_chain",
    "path_rows",
    "scatter_tree",
    "top_tokens",
    "tree_attention",
    "tree_walk",
]


def scatter_tree(
    positions: torch.Tensor,  # [num_tokens] int64, in place
    step_masks: torch.Tensor,  # [>= num_tree_reqs, (2,) W] int64, out
    query_start_loc: torch.Tensor,  # [>= num_tree_reqs + 1] int32
    cu_num_logits: torch.Tensor,  # [>= num_tree_reqs + 1] int32
    idx_mapping: torch.Tensor,  # [>= num_tree_reqs] int64
    depths: torch.Tensor,  # [max_num_reqs, W] int32
    masks: torch.Tensor,  # [max_num_reqs, (2,) W] int64
    num_tree_reqs: int,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.scatter.scatter_tree`."""
    check_scatter_tree(
        positions, step_masks, query_start_loc, cu_num_logits, idx_mapping, depths, masks,
        num_tree_reqs,
    )  # fmt: skip
    ends, cu = query_start_loc.tolist(), cu_num_logits.tolist()
    for r, idx in enumerate(idx_mapping.tolist()[:num_tree_reqs]):
        if idx < 0:
            continue
        num_rows = min(cu[r + 1] - cu[r], depths.shape[1])
        root = ends[r + 1] - (cu[r + 1] - cu[r])
        if num_rows > 0:
            tree_depths = depths[idx, 1:num_rows].to(torch.int64)
            positions[root + 1 : root + num_rows] = positions[root] + tree_depths
        step_masks[r] = masks[idx]


def _moves(root: int, path_mask: int | list[int]) -> list[tuple[int, int]]:
    """(source, target) KV positions of one request, in the order they have to be made."""
    rows = path_rows(path_mask)
    return [(root + rows[j], root + j) for j in range(1, len(rows)) if rows[j] != j]


def compact_kv(
    layer_ptrs: torch.Tensor,  # [num_layers] int64, addresses of CPU memory
    block_table: torch.Tensor,  # [max_num_reqs, max_blocks] int32
    idx_mapping: torch.Tensor,  # [>= num_reqs] int64, negative: skip
    root_positions: torch.Tensor,  # [>= num_reqs] int64
    path_masks: torch.Tensor,  # [>= num_reqs] or [>= num_reqs, 2] int64
    *,
    num_reqs: int,
    block_size: int,
    block_stride: int,
    slot_stride: int,
    head_stride: int,
    num_kv_heads: int,
    row_elems: int,
    dtype: torch.dtype,
    alignment: int | None = None,
) -> None:
    """Twin of :func:`vllm_medusa.triton_kernels.kv_compaction.compact_kv`, CPU memory only."""
    check_compact_kv(
        layer_ptrs, block_table, idx_mapping, root_positions, path_masks, num_reqs=num_reqs,
        block_size=block_size, num_kv_heads=num_kv_heads, row_elems=row_elems, dtype=dtype,
        alignment=alignment,
    )  # fmt: skip
    require(
        layer_ptrs.device.type == "cpu", "layer_ptrs", f"device {layer_ptrs.device}",
        "addresses of CPU memory; reference.KVCompactor works on any device",
    )  # fmt: skip

    def address(base: int, table_row: list[int], key: int, head: int) -> int:
        block, slot = table_row[key // block_size], key % block_size
        element = block * block_stride + slot * slot_stride + head * head_stride
        return base + element * dtype.itemsize

    tables = block_table.tolist()
    roots, masks = root_positions.tolist(), path_masks.tolist()
    for r, idx in enumerate(idx_mapping.tolist()[:num_reqs]):
        for source, target in _moves(roots[r], masks[r]) if idx >= 0 else []:
            for base in layer_ptrs.tolist():
                for head in range(num_kv_heads):
                    ctypes.memmove(
                        address(base, tables[idx], target, head),
                        address(base, tables[idx], source, head),
                        row_elems * dtype.itemsize,
                    )


class KVCompactor:
    """Twin of :class:`vllm_medusa.triton_kernels.kv_compaction.KVCompactor`, any device.

    Reads path masks on the host, then moves all rows of a layer with one gather and one
    scatter; the gather copies, so overlapping sources and targets do no harm.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor]) -> None:
        group_layers(kv_caches)  # the checks
        # Viewed as integers: indexing is not implemented for every float8 type.
        distinct = {cache.data_ptr(): cache for cache in kv_caches}.values()
        self._kv_caches = [cache.view(WORDS[cache.element_size()]) for cache in distinct]

    def __call__(
        self,
        block_table: torch.Tensor,  # [max_num_reqs, max_blocks] int32
        idx_mapping: torch.Tensor,  # [>= num_reqs] int64, negative: skip
        root_positions: torch.Tensor,  # [>= num_reqs] int64
        path_masks: torch.Tensor,  # [>= num_reqs] or [>= num_reqs, 2] int64
        *,
        num_reqs: int | None = None,  # default: all of idx_mapping
    ) -> None:
        """Compact every cache; see ``compact_kv`` for the arguments."""
        first = self._kv_caches[0]
        block_size = first.shape[2]
        roots, masks = root_positions.tolist(), path_masks.tolist()
        places = [
            (block_table[idx, key // block_size].item(), key % block_size)
            for r, idx in enumerate(idx_mapping.tolist()[:num_reqs])
            if idx >= 0
            for move in _moves(roots[r], masks[r])
            for key in move
        ]
        if not places:
            return
        # [2, num_moves] each: row 0 the sources, row 1 the targets
        places_t = torch.tensor(places, device=first.device).view(-1, 2, 2)
        blocks, slots = places_t.permute(2, 1, 0)
        for cache in self._kv_caches:
            cache[blocks[1], :, slots[1]] = cache[blocks[0], :, slots[0]]
