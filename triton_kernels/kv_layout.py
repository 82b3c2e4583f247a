"""Describe KV caches as rows of integer words, so that one kernel moves every dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .checks import require

# bytes of a word -> the integer dtype that stands for it
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one layout.  Strides and `row_words` count words of `word_bytes` bytes.

    `alignment` divides the address of every row: 16 bytes, the widest load, or the word.
    """

    block_size: int
    block_stride: int
    slot_stride: int
    head_stride: int
    num_heads: int
    row_words: int
    word_bytes: int
    alignment: int
    addresses: tuple[int, ...] = ()


def _describe(index: int, cache: torch.Tensor) -> LayerGroup:
    """Layout of one cache in the widest word that divides its address, strides and row."""
    name = f"kv_caches[{index}]"
    require(cache.dim() == 4, name, f"shape {list(cache.shape)}", "[blocks, heads, slots, C]")
    require(cache.stride(3) == 1, name, f"last stride {cache.stride(3)}", "a last stride of 1")
    _, num_heads, block_size, row = cache.shape
    block_stride, head_stride, slot_stride, _ = cache.stride()
    if num_heads > 1 and head_stride == row:
        # Heads of a slot lie side by side (the default LBNHC order): one wide row.
        num_heads, row = 1, num_heads * row
    size = cache.element_size()
    in_bytes = [size * n for n in (block_stride, slot_stride, row)]
    in_bytes.append(size * head_stride if num_heads > 1 else 0)
    *strides, row_bytes, head_bytes = in_bytes
    places = (*strides, head_bytes, cache.data_ptr())
    word = next(w for w in WORDS if all(n % w == 0 for n in (*places, row_bytes)))
    alignment = 16 if all(n % 16 == 0 for n in places) else word
    block_words, slot_words, row_words, head_words = (n // word for n in in_bytes)
    return LayerGroup(
        block_size, block_words, slot_words, head_words, num_heads, row_words, word, alignment,
        (cache.data_ptr(),),
    )  # fmt: skip


def group_layers(kv_caches: Sequence[torch.Tensor]) -> list[LayerGroup]:
    """Group caches by layout and drop repetitions of the same memory.

    Parameters
    ----------
    kv_caches : sequence of torch.Tensor
        Each ``[num_blocks, num_kv_heads, block_size, C]`` with a dense last dimension.

    Returns
    -------
    list of LayerGroup
        Every distinct cache occurs in exactly one group.  A row moved twice would move to
        the wrong place, hence layers that share a tensor count once.
    """
    require(len(kv_caches) > 0, "kv_caches", "an empty list", "at least one cache")
    first = kv_caches[0]
    seen: set[int] = set()
    groups: dict[LayerGroup, list[int]] = {}
    for index, cache in enumerate(kv_caches):
        name = f"kv_caches[{index}]"
        require(cache.device == first.device, name, f"device {cache.device}", f"{first.device}")
        layout = _describe(index, cache)
        require(
            layout.block_size == first.shape[2], name,
            f"block size {layout.block_size}", f"{first.shape[2]}, as in kv_caches[0]",
        )  # fmt: skip
        if cache.data_ptr() not in seen:
            seen.add(cache.data_ptr())
            groups.setdefault(replace(layout, addresses=()), []).append(cache.data_ptr())
    return [replace(layout, addresses=tuple(ptrs)) for layout, ptrs in groups.items()]
