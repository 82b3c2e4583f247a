"""Tree paths: sequences of child ranks, checked and ordered."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import Any

# The root and 63 nodes fill one 64-bit word, the unit of every ancestor mask; kernels read two.
MAX_NODES = 127
# Output columns that no token of an accepted path needs carry its mask. A tree of two words
# has to leave two of them, and heads are far fewer than this.
ONE_WORD_NODES = 63
MAX_DEPTH_OF_TWO_WORDS = 62

TreePath = tuple[int, ...]


def as_path(path: Any) -> TreePath:
    """Return ``path`` as a tuple of ints, or raise ValueError naming it."""
    if not isinstance(path, Sequence) or isinstance(path, str | bytes):
        raise ValueError(
            f"tree: found {path!r} where a path was expected; write every node as a list of "
            "ranks, e.g. [0] for the first choice of head 1"
        )
    return tuple(_as_index(rank, f"tree: path {list(path)}") for rank in path)


def parents_first(paths: tuple[TreePath, ...]) -> bool:
    """Tell whether every path comes after its parent."""
    seen: set[TreePath] = {()}
    for path in paths:
        if path[:-1] not in seen:
            return False
        seen.add(path)
    return True


def check_paths(paths: tuple[TreePath, ...]) -> None:
    """Raise ValueError unless ``paths`` is a tree of 1..127 nodes, parents first."""
    if not paths:
        raise ValueError("tree: found no paths, expected at least one node such as [0]")
    known: set[TreePath] = set(paths)
    seen: set[TreePath] = {()}
    for path in paths:
        if not path:
            raise ValueError(
                "tree: found the empty path []; the root is implied, remove that entry"
            )
        if min(path) < 0:
            raise ValueError(
                f"tree: path {list(path)} has the negative rank {min(path)}; ranks count a "
                "head's choices from 0"
            )
        if path in seen:
            raise ValueError(f"tree: path {list(path)} occurs twice; remove one of them")
        parent = path[:-1]
        if parent not in seen:
            if parent in known:
                raise ValueError(
                    f"tree: path {list(path)} comes before its parent {list(parent)}; build "
                    "the tree with TokenTree.from_paths, which sorts"
                )
            raise ValueError(
                f"tree: path {list(path)} has no parent {list(parent)} in the tree; add "
                f"{list(parent)} or remove {list(path)}"
            )
        seen.add(path)
    if len(paths) > MAX_NODES:
        raise ValueError(
            f"tree: found {len(paths)} nodes, expected at most {MAX_NODES} (with the root two "
            f"64-bit mask words); remove {list(paths[MAX_NODES])} and what follows it"
        )
    depth = max(map(len, paths))
    if len(paths) > ONE_WORD_NODES and depth > MAX_DEPTH_OF_TWO_WORDS:
        raise ValueError(
            f"tree: found {len(paths)} nodes and depth {depth}; a tree of more than "
            f"{ONE_WORD_NODES} nodes is at most {MAX_DEPTH_OF_TWO_WORDS} deep, remove the deeper "
            "paths"
        )


def widths_to_paths(widths: Sequence[int]) -> tuple[TreePath, ...]:
    """Return the Cartesian product of ``range(width)`` per depth, shallow nodes first."""
    checked = [_as_index(width, f"tree widths {list(widths)}") for width in widths]
    if not checked or min(checked) < 1:
        raise ValueError(
            f"tree widths: found {list(widths)}, expected one integer >= 1 per depth; leave "
            "out the depths that should have no nodes"
        )
    num_nodes = sum(accumulate(checked, operator.mul))
    if num_nodes > MAX_NODES:
        raise ValueError(
            f"tree widths: {list(widths)} give {num_nodes} nodes, expected at most {MAX_NODES}; "
            "lower a width or give the paths you want to keep"
        )
    return tuple(
        path
        for depth in range(1, len(checked) + 1)
        for path in product(*(range(width) for width in checked[:depth]))
    )


def split_tree_json(content: Any) -> tuple[Sequence[Sequence[int]], dict[str, Any]]:
    """Split decoded JSON (mapping, widths or paths) into paths and metadata."""
    if isinstance(content, Mapping):
        if "paths" not in content:
            raise ValueError(
                f"tree: the mapping has keys {sorted(map(str, content))}, expected a key "
                '"paths" that holds a list of paths'
            )
        paths = content["paths"]
        if not isinstance(paths, Sequence) or isinstance(paths, str | bytes):
            raise ValueError(f'tree: "paths" is {paths!r}, expected a list such as [[0], [0, 0]]')
        return paths, {k: v for k, v in content.items() if k != "paths"}
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        raise ValueError(
            f"tree: found {content!r}, expected a list of widths such as [4, 2, 1] or a list "
            "of paths such as [[0], [0, 0], [1]]"
        )
    nested = [isinstance(item, Sequence) and not isinstance(item, str) for item in content]
    if content and not any(nested):
        return widths_to_paths(content), {}
    # A number among paths is refused by as_path, with the number in the message.
    return content, {}


def _as_index(value: Any, where: str) -> int:
    # bool is an int to Python, but `true` in a JSON file is a mistake.
    if isinstance(value, bool):
        raise ValueError(f"{where}: found {value!r}, expected an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{where}: found {value!r}, expected an integer") from None
