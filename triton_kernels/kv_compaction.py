"""Move the KV rows of the accepted path next to the root: kernel, launcher, wrapper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .checks import check_compact_kv, check_runnable
from .kv_layout import WORDS, LayerGroup, group_layers

_TL_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}

# Rows moved per pass, words and layers per program. A small batch is a chain of round trips, which
# many programs with little to do each shorten, while they all fit on the device at once (132
# multiprocessors, 8 each). In a large one the path and the pages are found once for several
# layers, whose rows are loaded together: 4 x 4 x 256 x 8 bytes are 256 bytes a thread with 4 warps.
_NARROW = {"MOVES": 8, "BLOCK": 128, "LAYERS": 1}
_WIDE = {"MOVES": 4, "BLOCK": 256, "LAYERS": 4}
_PROGRAMS_AT_ONCE = 1056


@triton.jit
def _compact_kv_kernel(
    layer_ptrs,  # in [num_layers] int64, base addresses; the caches are changed in place
    block_table,  # in [max_num_reqs, max_blocks] int32
    idx_mapping,  # in [R] int64, batch row -> row of `block_table`, negative: skip
    root_positions,  # in [R] int64, KV position of the root row
    path_masks,  # in [R] or [R, NUM_WORDS] int64, bit b: row b is accepted
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    row_words,
    num_layers,
    WORD: tl.constexpr,
    NUM_WORDS: tl.constexpr,  # of a path mask
    BLOCK_SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of every row in bytes, 16 or the word's size
    CHUNKS: tl.constexpr,  # column chunks of one (slot, head) row
    BLOCK: tl.constexpr,
    MOVES: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """Grid: (num_kv_heads * CHUNKS, groups of LAYERS layers, R).

    One program owns one column chunk of one head of its layers for one request, so no two
    programs touch the same word.  Within a program sources and destinations overlap.  Row j
    receives row b_j >= j, and passes go through j in ascending order:

    - a source is never a row that an earlier move has overwritten, because every earlier
      destination j' satisfies j' < j <= b_j;
    - a destination may still be a *source* of this pass.  All loads of a pass come before
      its barrier and all stores after it, so whichever thread owns a word, its old content
      has been read by every thread when it is overwritten.
    """
    req = tl.program_id(2)
    # All four at once, before the branch: one round trip to memory instead of two.
    path = tl.load(path_masks + req * NUM_WORDS).to(tl.uint64, bitcast=True)
    high_path = path
    if NUM_WORDS > 1:
        high_path = tl.load(path_masks + req * NUM_WORDS + 1).to(tl.uint64, bitcast=True)
    idx = tl.load(idx_mapping + req).to(tl.int64)
    root = tl.load(root_positions + req).to(tl.int64)
    layers = tl.program_id(1) * LAYERS + tl.arange(0, LAYERS)
    is_layer = layers < num_layers
    base = tl.load(layer_ptrs + layers, mask=is_layer, other=0).to(tl.pointer_type(WORD))
    # Contiguous low bits: every accepted row already sits in its place.
    in_place = (path & (path + 1)) == 0
    if NUM_WORDS > 1:
        # The second word's bits only follow on the first's if that is full.
        is_full = path + 1 == 0
        in_place &= ((high_path & (high_path + 1)) == 0) & (is_full | (high_path == 0))
    if in_place | (idx < 0):
        return

    head = (tl.program_id(0) // CHUNKS).to(tl.int64)
    columns = (tl.program_id(0) % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
    # An address from memory has no known alignment, without which loads are one word wide.
    base = tl.multiple_of(base + head * head_stride, ALIGNMENT)
    table_row = block_table + idx * table_stride

    bits = tl.arange(0, 64 * NUM_WORDS)
    if NUM_WORDS > 1:
        own_word = tl.where(bits < 64, path, high_path)
        is_set = ((own_word >> (bits & 63).to(tl.uint64)) & 1).to(tl.int32)
    else:
        is_set = ((path >> bits.to(tl.uint64)) & 1).to(tl.int32)
    # Pages of all accepted rows are on their way while the rows are put in order.
    pages = tl.load(table_row + (root + bits) // BLOCK_SIZE, mask=is_set != 0, other=0)
    order = tl.cumsum(is_set, 0) - 1  # row -> how many accepted rows precede it
    num_rows = tl.sum(is_set)
    for first in range(1, num_rows, MOVES):
        target = first + tl.arange(0, MOVES)  # j
        target_key = root + target
        target_page = tl.load(table_row + target_key // BLOCK_SIZE, mask=target < num_rows, other=0)
        chosen = (order[None, :] == target[:, None]) & (is_set[None, :] != 0)
        source = tl.sum(tl.where(chosen, bits[None, :], 0), 1)  # b_j
        source_page = tl.sum(tl.where(chosen, pages[None, :], 0), 1)
        moves = (target < num_rows) & (source != target)
        inside = moves[:, None] & (columns < row_words)[None, :]
        inside = is_layer[:, None, None] & inside[None, :, :]

        source_row = source_page.to(tl.int64) * block_stride
        source_row += ((root + source) % BLOCK_SIZE) * slot_stride
        sources = source_row[:, None] + columns[None, :]
        words = tl.load(base[:, None, None] + sources[None, :, :], mask=inside)

        target_row = target_page.to(tl.int64) * block_stride
        target_row += (target_key % BLOCK_SIZE) * slot_stride
        targets = target_row[:, None] + columns[None, :]
        tl.debug_barrier()
        tl.store(base[:, None, None] + targets[None, :, :], words, mask=inside)


def compact_kv(
    layer_ptrs: torch.Tensor,
    block_table: torch.Tensor,
    idx_mapping: torch.Tensor,
    root_positions: torch.Tensor,
    path_masks: torch.Tensor,
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
    """Move accepted KV rows to the positions behind the root, all layers in one launch.

    With ``b_0 = 0 < b_1 < ... < b_a`` the set bits of a request's path mask, the row at KV
    position ``root + b_j`` moves to ``root + j``.  Rows are moved as integer words, so any
    content, NaN payloads and packed formats included, arrives bit for bit.

    Parameters
    ----------
    layer_ptrs : torch.Tensor
        ``[num_layers]`` int64. Base addresses of caches that share the strides below.
    block_table : torch.Tensor
        ``[max_num_reqs, max_blocks]`` int32.
    idx_mapping : torch.Tensor
        ``[>= num_reqs]`` int64 or int32. Batch row -> row of `block_table`; negative: skip.
    root_positions : torch.Tensor
        ``[>= num_reqs]`` int64 or int32. KV position of each request's root row.
    path_masks : torch.Tensor
        ``[>= num_reqs]`` int64, or ``[>= num_reqs, 2]`` for trees of more than 64 rows: bits of
        rows 0..63, then of 64..127. Bit 0 is the root and has to be set, or all are 0 (skip).
    num_reqs, block_size, num_kv_heads : int
        Requests of the batch; KV slots of a block; heads that are moved.
    block_stride, slot_stride, head_stride, row_elems : int
        In elements of `dtype`.
    dtype : torch.dtype
        Only its size counts: the unit in which the strides are given and words are moved.
    alignment : int, optional
        16 promises that every row starts at a multiple of 16 bytes; else the size of `dtype`.

    Examples
    --------
    Root at position 10, path mask ``0b101001`` (rows 0, 3, 5): slot 13 moves to slot 11 and
    slot 15 to slot 12.
    """
    check_compact_kv(
        layer_ptrs, block_table, idx_mapping, root_positions, path_masks, num_reqs=num_reqs,
        block_size=block_size, num_kv_heads=num_kv_heads, row_elems=row_elems, dtype=dtype,
        alignment=alignment,
    )  # fmt: skip
    check_runnable("layer_ptrs", layer_ptrs, _compact_kv_kernel)
    if num_reqs == 0 or layer_ptrs.shape[0] == 0:
        return
    num_layers = layer_ptrs.shape[0]
    padded_row = triton.next_power_of_2(row_elems)
    programs = num_kv_heads * triton.cdiv(row_elems, _WIDE["BLOCK"]) * num_layers * num_reqs
    sizes = _NARROW if programs < _PROGRAMS_AT_ONCE else _WIDE
    sizes = sizes | {"BLOCK": min(sizes["BLOCK"], padded_row)}
    chunks = triton.cdiv(row_elems, sizes["BLOCK"])
    layer_groups = triton.cdiv(num_layers, sizes["LAYERS"])
    _compact_kv_kernel[(num_kv_heads * chunks, layer_groups, num_reqs)](
        layer_ptrs, block_table, idx_mapping, root_positions, path_masks,
        block_table.stride(0), block_stride, slot_stride, head_stride, row_elems, num_layers,
        WORD=_TL_WORDS[dtype.itemsize], NUM_WORDS=path_masks.dim(), BLOCK_SIZE=block_size,
        ALIGNMENT=alignment or dtype.itemsize, CHUNKS=chunks, **sizes, num_warps=4,
    )  # fmt: skip


class KVCompactor:
    """Compaction of a fixed set of KV caches; builds the address tables once.

    Layers are grouped by layout (strides, alignment), one launch per group, so usually one
    in all.  Layers that share one tensor (cross-layer KV sharing) are moved once.

    Parameters
    ----------
    kv_caches : sequence of torch.Tensor
        Each ``[num_blocks, num_kv_heads, block_size, C]``, strided views with a dense last
        dimension, all on one device and with the same block size.

    Examples
    --------
    >>> compactor = KVCompactor(list_of_layer_caches)
    >>> compactor(block_table, idx_mapping, root_positions, path_masks, num_reqs=4)
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor]) -> None:
        self._groups: list[LayerGroup] = group_layers(kv_caches)
        # The addresses are only good for as long as the tensors live.
        self._kv_caches = list(kv_caches)
        self._layer_ptrs = [
            torch.tensor(group.addresses, dtype=torch.int64, device=kv_caches[0].device)
            for group in self._groups
        ]

    def __call__(
        self,
        block_table: torch.Tensor,  # [max_num_reqs, max_blocks] int32
        idx_mapping: torch.Tensor,  # [>= num_reqs] int64, negative: skip
        root_positions: torch.Tensor,  # [>= num_reqs] int64
        path_masks: torch.Tensor,  # [>= num_reqs] or [>= num_reqs, 2] int64
        *,
        num_reqs: int | None = None,  # default: all of idx_mapping
    ) -> None:
        """Compact every cache; see :func:`compact_kv` for the arguments."""
        num_reqs = idx_mapping.shape[0] if num_reqs is None else num_reqs
        for group, layer_ptrs in zip(self._groups, self._layer_ptrs, strict=True):
            compact_kv(
                layer_ptrs, block_table, idx_mapping, root_positions, path_masks,
                num_reqs=num_reqs, block_size=group.block_size,
                block_stride=group.block_stride, slot_stride=group.slot_stride,
                head_stride=group.head_stride, num_kv_heads=group.num_heads,
                row_elems=group.row_words, dtype=WORDS[group.word_bytes],
                alignment=group.alignment,
            )  # fmt: skip
