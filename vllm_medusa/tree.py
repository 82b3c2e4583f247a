"""TokenTree: the shape of one step's speculation, as paths of child ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vllm_medusa.tree_paths import (
    MAX_NODES,
    TreePath,
    as_path,
    check_paths,
    parents_first,
    split_tree_json,
    widths_to_paths,
)
from vllm_medusa.tree_presets import PUBLISHED_PATHS, published_paths
from vllm_medusa.tree_search import best_first_paths, check_accuracies, path_value

__all__ = ["MAX_NODES", "TokenTree"]


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """Immutable tree of draft nodes (paper section 2.1.2).

    A path ``(i_1, .., i_m)`` is a node at depth m: the i_m-th best token of head
    m, below the node ``(i_1, .., i_{m-1})``. The root (the token that the base
    model chose itself) is no path; it is row 0 of every per-row property and
    node ``paths[j]`` is row ``j + 1``.

    Parameters
    ----------
    paths
        Nodes, each after its parent. Order matters: ``cut`` keeps a prefix.
    metadata
        What a tree.json held beside its paths; not part of equality.

    Examples
    --------
    >>> tree = TokenTree.from_paths([[0], [0, 0], [1]])
    >>> tree.parents, tree.depths, tree.ranks
    ((-1, 0, 1, 0), (0, 1, 2, 1), (0, 0, 0, 1))
    >>> [f"{mask:04b}" for mask in tree.ancestor_masks]
    ['0001', '0011', '0111', '1001']
    """

    paths: tuple[TreePath, ...]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_paths(self.paths)

    # -- constructors -------------------------------------------------------

    @classmethod
    def from_paths(
        cls, paths: Sequence[Sequence[int]], metadata: Mapping[str, Any] | None = None
    ) -> TokenTree:
        """Build from child-rank paths in any order.

        An order in which every parent comes first is kept, since it may be the
        best-first order that makes budgets cuts; any other order is replaced by
        (depth, lexicographic).
        """
        tupled = tuple(as_path(path) for path in paths)
        if not parents_first(tupled):
            tupled = tuple(sorted(tupled, key=lambda path: (len(path), path)))
        return cls(tupled, dict(metadata or {}))

    @classmethod
    def from_widths(cls, widths: Sequence[int]) -> TokenTree:
        """Build the Cartesian product of the top ``widths[k]`` tokens of each head.

        Examples
        --------
        >>> TokenTree.from_widths([2, 1]).paths
        ((0,), (1,), (0, 0), (1, 0))
        """
        return cls(widths_to_paths(widths))

    @classmethod
    def preset(cls, name: str) -> TokenTree:
        """Return a published tree by its name, e.g. ``"mc_sim_7b_63"``."""
        return cls(published_paths(name), {"source": f"preset {name}"})

    @classmethod
    def best_first(cls, accuracies: Sequence[Sequence[float]], num_nodes: int) -> TokenTree:
        """Search the tree of ``num_nodes`` nodes that expects most tokens.

        Paper section 2.3.3: a node is worth the product of the accuracies along
        its path. As a child is never worth more than its parent, taking the best
        node next to the tree each time is optimal and gives nested budgets.

        Parameters
        ----------
        accuracies
            ``accuracies[k][i]``: how often the i-th choice of head k+1 (and no
            other) is the base model's token; [num_heads][num_ranks] floats.
        num_nodes
            Nodes wanted, root not included.

        Examples
        --------
        >>> TokenTree.best_first([[0.6, 0.2], [0.5, 0.1]], 3).paths
        ((0,), (0, 0), (1,))
        """
        paths = best_first_paths(check_accuracies(accuracies), num_nodes)
        return cls(paths, {"source": "best-first search"})

    @classmethod
    def load(cls, path: str | Path) -> TokenTree:
        """Read a tree.json: ``{"paths": [...], ...}`` or a bare list of paths."""
        path = Path(path)
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(
                f"tree: {path} does not exist; give a tree.json file, widths, paths or one of "
                f"the presets {', '.join(PUBLISHED_PATHS)}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"tree: cannot read {path} as JSON: {error}") from None
        try:
            return cls._from_json(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, spec: Any) -> TokenTree:
        """Build from whatever a user may write.

        Parameters
        ----------
        spec
            A TokenTree, a preset name, the path of a JSON file, a list of widths
            (``[4, 2, 1]``), a list of paths (``[[0], [0, 0]]``), a tree.json
            mapping, or the JSON text of one of the last three.
        """
        if isinstance(spec, TokenTree):
            return spec
        if isinstance(spec, Path):
            return cls.load(spec)
        if not isinstance(spec, str):
            return cls._from_json(spec)
        text = spec.strip()
        if text in PUBLISHED_PATHS:
            return cls.preset(text)
        if text[:1] in ("[", "{"):
            try:
                content = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"tree: {text!r} is not valid JSON ({error}); write widths as [4, 2, 1] "
                    "or paths as [[0], [0, 0], [1]]"
                ) from None
            return cls._from_json(content)
        if Path(text).is_file() or text.endswith(".json") or "/" in text:
            return cls.load(text)
        return cls.preset(text)

    @classmethod
    def _from_json(cls, content: Any) -> TokenTree:
        return cls.from_paths(*split_tree_json(content))

    # -- shape --------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        """Number of draft nodes, root not included."""
        return len(self.paths)

    @property
    def num_rows(self) -> int:
        """Number of query rows of one verification: the root and every node."""
        return len(self.paths) + 1

    @cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node: how many heads the tree uses."""
        return max(len(path) for path in self.paths)

    @cached_property
    def max_rank(self) -> int:
        """Largest child rank; a head must supply ``max_rank + 1`` tokens."""
        return max(max(path) for path in self.paths)

    @cached_property
    def nodes_per_depth(self) -> tuple[int, ...]:
        """Number of nodes at depth 1, 2, .., max_depth."""
        return tuple(
            sum(len(path) == depth for path in self.paths)
            for depth in range(1, self.max_depth + 1)
        )

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """[num_rows] row -> parent row, -1 at the root."""
        rows = {(): 0} | {path: row for row, path in enumerate(self.paths, start=1)}
        return (-1, *(rows[path[:-1]] for path in self.paths))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """[num_rows] row -> depth, 0 at the root."""
        return (0, *(len(path) for path in self.paths))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """[num_rows] row -> rank among its head's choices, 0 at the root."""
        return (0, *(path[-1] for path in self.paths))

    @cached_property
    def ancestor_masks(self) -> tuple[int, ...]:
        """[num_rows] unsigned numbers; bit j: row j is the row or an ancestor."""
        masks = [1]
        for row, parent in enumerate(self.parents[1:], start=1):
            masks.append(masks[parent] | 1 << row)
        return tuple(masks)

    def path_to(self, row: int) -> list[int]:
        """Rows from the root to ``row``, both included."""
        path = [row]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def mask_words(self) -> np.ndarray:
        """Return ``ancestor_masks`` as tensors store them, in int64 words of the same bits.

        [num_rows]; with more than 63 nodes [2, num_rows], bits 0..63 and then 64..127.
        """
        words = [
            [mask >> first & 0xFFFF_FFFF_FFFF_FFFF for mask in self.ancestor_masks]
            for first in range(0, self.num_rows, 64)
        ]
        return np.array(words if len(words) > 1 else words[0], dtype=np.uint64).view(np.int64)

    # -- use ----------------------------------------------------------------

    def cut(self, num_nodes: int) -> TokenTree:
        """Return the tree of the first ``num_nodes`` nodes."""
        if not 1 <= num_nodes <= self.num_nodes:
            raise ValueError(
                f"num_nodes: found {num_nodes}, expected 1..{self.num_nodes}, the size of this "
                "tree; choose a budget in that range or a larger tree"
            )
        if num_nodes == self.num_nodes:
            return self
        # The expectation was that of the whole tree; everything else still holds.
        kept = {k: v for k, v in self.metadata.items() if k != "expected_tokens_per_step"}
        return TokenTree(self.paths[:num_nodes], kept)

    def validate(self, num_heads: int, top_k_limit: int | None = None) -> None:
        """Raise ValueError unless ``num_heads`` heads can fill every node.

        Parameters
        ----------
        num_heads
            Heads of the checkpoint; no node may be deeper.
        top_k_limit
            Choices that a head supplies; every rank must be below it.
        """
        for path in self.paths:
            if len(path) > num_heads:
                raise ValueError(
                    f"tree: path {list(path)} has depth {len(path)}, but there are only "
                    f"{num_heads} heads; remove paths deeper than {num_heads} or use a "
                    "checkpoint with more heads"
                )
            if top_k_limit is not None and max(path) >= top_k_limit:
                raise ValueError(
                    f"tree: path {list(path)} has rank {max(path)}, but a head supplies only "
                    f"ranks 0..{top_k_limit - 1}; remove that path or raise the limit"
                )

    def expected_tokens(self, accuracies: Sequence[Sequence[float]]) -> float:
        """Return the tokens per step that the accuracies predict, root included.

        Parameters
        ----------
        accuracies
            As for ``best_first``.

        Examples
        --------
        >>> TokenTree.from_paths([[0], [0, 0]]).expected_tokens([[0.5], [0.5]])
        1.75
        """
        return path_value(self.paths, check_accuracies(accuracies))

    def save(self, path: str | Path) -> None:
        """Write tree.json: the paths in order and the metadata."""
        content = {
            "paths": [list(node) for node in self.paths],
            "source": None,
            "expected_tokens_per_step": None,
            **self.metadata,
        }
        Path(path).write_text(json.dumps(content) + "\n")
