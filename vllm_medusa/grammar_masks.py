"""Grammar masks of a token tree: what each node's own path allows next.

vLLM fills the masks of a request's drafts along their order, as a chain.  Here the
grammar follows the tree, depth first: into a child by accepting its token, out of it by
rolling one token back.  A child that its parent's mask forbids is never drawn there, so
neither it nor anything below it needs a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_medusa.path_chains import leaf_paths
from vllm_medusa.tree import TokenTree
from vllm_medusa.vllm_seams import constraint_bounds

# A row of a mask without bits set to zero: everything is allowed.
ALLOW_ALL = -1


class GrammarTree:
    """The part of a tree that one step verifies for one request, filled with its drafts.

    Parameters
    ----------
    tree : TokenTree
        W rows, root included.
    drafts : sequence of int
        Draft tokens of the first nodes, in node order; none negative.
    """

    def __init__(self, tree: TokenTree, drafts: Sequence[int]):
        self.tree = tree
        self.num_rows = len(drafts) + 1
        # A row's own token; nobody reads the root's.
        self.tokens = [-1, *drafts]
        self.children: list[list[int]] = [[] for _ in range(self.num_rows)]
        for row in range(1, self.num_rows):
            self.children[tree.parents[row]].append(row)

    def constraints(self, manager: Any, request: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where a reasoning parser lets the grammar begin, on every path.

        Returns
        -------
        fed, masked : numpy.ndarray, [num_rows] bool
            Whether the row's own token advances the grammar; whether the grammar
            restricts what comes after it.
        """
        fed = np.ones(self.num_rows, dtype=bool)
        masked = np.ones(self.num_rows, dtype=bool)
        if constraint_bounds(manager, request, ()).constraint_start == 0:
            return fed, masked
        for path in leaf_paths(self.tree, self.num_rows):
            tokens = [self.tokens[row] for row in path[1:]]
            bounds = constraint_bounds(manager, request, tokens)
            for depth, row in enumerate(path):
                fed[row] = depth > bounds.grammar_start
                masked[row] = depth >= bounds.constraint_start
        return fed, masked

    def fill(
        self,
        grammar: Any,
        request_id: str,
        masks: torch.Tensor,  # [num_rows, ceil(vocab_size / 32)] int32
        fed: np.ndarray,
        masked: np.ndarray,
    ) -> None:
        """Write the mask of every row that can be reached; the grammar ends where it began.

        Parameters
        ----------
        grammar : vllm.v1.structured_output.backend_types.StructuredOutputGrammar
            In the state behind the root's token.
        request_id : str
        masks : torch.Tensor
            Rows of this request.
        fed, masked : numpy.ndarray
            From :meth:`constraints`.
        """
        masks.fill_(ALLOW_ALL)
        words = masks.numpy()

        def visit(row: int) -> None:
            if grammar.is_terminated():
                # As in vLLM: what follows the end of a grammar is free.
                return
            if masked[row]:
                grammar.fill_bitmask(masks, row)
            for child in self.children[row]:
                token = self.tokens[child]
                if not fed[child]:
                    visit(child)
                elif _allowed(grammar, words[row] if masked[row] else None, token) and (
                    grammar.accept_tokens(request_id, [token])
                ):
                    visit(child)
                    grammar.rollback(1)

        visit(0)


def _allowed(grammar: Any, mask: np.ndarray | None, token: int) -> bool:
    """Whether the grammar takes the token next; its mask knows, where there is one."""
    if mask is None:
        return bool(grammar.validate_tokens([token]))
    return bool(mask[token // 32] >> (token % 32) & 1)


def tree_masks(
    manager: Any,
    tree: TokenTree,
    requests: Mapping[str, Any],
    request_ids: Sequence[str],
    drafts: Mapping[str, list[int]],
) -> tuple[np.ndarray, list[int]]:
    """Masks of all structured-output requests of a step, one row per logits row.

    Parameters
    ----------
    manager : vllm.v1.structured_output.StructuredOutputManager
    tree : TokenTree
        The start-up tree.
    requests : mapping
        Request id -> vLLM's request.
    request_ids : sequence of str
        Whose masks, in the order of the rows.
    drafts : mapping
        Request id -> its scheduled drafts in node order, -1 where nothing is known.

    Returns
    -------
    masks : numpy.ndarray, [num_rows, ceil(vocab_size / 32)] int32
    acceptable : list of int
        Per request, how many of its drafts the masks cover: those that are known.
    """
    scheduled = [drafts.get(request_id, []) for request_id in request_ids]
    counts = [len(tokens) + 1 for tokens in scheduled]
    masks = manager.backend.allocate_token_bitmask(sum(counts))
    acceptable, start = [], 0
    for request_id, tokens, count in zip(request_ids, scheduled, counts, strict=True):
        request = requests[request_id]
        # Placeholders stand at the end: what is before them is a tree of its own.
        known = strip_speculative_padding(tokens)
        rows = masks[start : start + count]
        rows[len(known) + 1 :].fill_(ALLOW_ALL)
        filled = GrammarTree(tree, known)
        filled.fill(
            request.structured_output_request.grammar,
            request_id,
            rows[: len(known) + 1],
            *filled.constraints(manager, request),
        )
        acceptable.append(len(known))
        start += count
    return masks.numpy(), acceptable
