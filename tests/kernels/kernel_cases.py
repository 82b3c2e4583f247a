"""Trees and ragged tables of the kernel tests, written apart from the product's TokenTree."""

from __future__ import annotations

import random

import torch


def random_parents(rng: random.Random, num_nodes: int) -> list[int]:
    """Parents of a uniformly grown random tree, -1 at the root."""
    return [-1] + [rng.randrange(row) for row in range(1, num_nodes + 1)]


def chain_parents(num_nodes: int) -> list[int]:
    return list(range(-1, num_nodes))


def star_parents(num_nodes: int) -> list[int]:
    return [-1] + [0] * num_nodes


def binary_parents(num_nodes: int) -> list[int]:
    """Heap order: full when num_nodes + 1 is a power of two."""
    return [-1] + [(row - 1) // 2 for row in range(1, num_nodes + 1)]


# name -> parents, labelled by the edge they hit
NAMED_TREES: dict[str, list[int]] = {
    "root-only": [-1],
    "one-node": [-1, 0],
    "chain-5": chain_parents(5),
    "chain-63": chain_parents(63),
    "star-63": star_parents(63),
    "full-63": binary_parents(63),
    "random-15": random_parents(random.Random(1), 15),  # 16 rows, a power of two
    "random-16": random_parents(random.Random(2), 16),  # one more
    "random-30": random_parents(random.Random(3), 30),  # 31 rows, one less than a power of two
    "random-63": random_parents(random.Random(4), 63),
    # More rows than bits of a word: one more, all but one of two words, and all.
    "random-64": random_parents(random.Random(5), 64),
    "random-126": random_parents(random.Random(6), 126),
    "chain-127": chain_parents(127),
    "star-127": star_parents(127),
    "full-127": binary_parents(127),
}


def depths_of(parents: list[int]) -> list[int]:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def ancestors_of(parents: list[int], row: int) -> list[int]:
    """Rows from the root down to `row` itself."""
    path = [row]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def signed_words(bits: int, count: int) -> list[int]:
    """`count` int64 whose bit patterns, the lowest first, are those of `bits`."""
    words = [bits >> 64 * index & (1 << 64) - 1 for index in range(count)]
    return [word - (1 << 64) if word >> 63 else word for word in words]


def path_words(masks: list[int], num_rows: int) -> torch.Tensor:
    """Path masks as ``[len(masks)]``, or ``[len(masks), 2]`` for more than 64 rows, int64."""
    words = torch.tensor([signed_words(mask, 2) for mask in masks], dtype=torch.int64)
    return words if num_rows > 64 else words[:, 0].contiguous()


def mask_table(trees: list[list[int]], width: int, fill: int) -> torch.Tensor:
    """Ancestor-or-self words ``[len(trees), width]``, or ``[.., 2, width]`` for more than 64 rows.

    `fill` stands where a tree has no row, and in a whole row for the tree None.
    """
    count = 2 if width > 64 else 1
    table = torch.full((len(trees), count, width), fill, dtype=torch.int64)
    for index, parents in enumerate(trees):
        for row in range(len(parents or [])):
            mask = sum(1 << ancestor for ancestor in ancestors_of(parents, row))
            table[index, :, row] = torch.tensor(signed_words(mask, count))
    return table if count > 1 else table[:, 0].contiguous()


def padded_rows(rows: list[list[int]], width: int, fill: int, dtype: torch.dtype) -> torch.Tensor:
    """Ragged rows as one ``[len(rows), width]`` tensor."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def cumulated(lengths: list[int]) -> torch.Tensor:
    """``[len + 1]`` int32 starts."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
