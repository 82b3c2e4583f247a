"""Drafts a tree with sequential heads: level by level, each head seeing its node's path.

Every node of a fixed tree is drafted with its log probability behind its own path.  That tree is
what is verified, or the pool from which each request's best nodes are taken at every step, with
what its history proposes (:class:`vllm_medusa.tree_chooser.TreeChooser`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from vllm_medusa.heads import MedusaHeads
from vllm_medusa.heads_path import path_update
from vllm_medusa.kernels import top_tokens
from vllm_medusa.prompt_lookup import PromptLookup
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.tree_candidates import candidate_tables
from vllm_medusa.tree_chooser import TreeChooser

# Rows that the requests of a batch share when it is drafted: twice what a step verifies by
# default, so that no width that pays lacks its nodes. A head's product over all parents of 63
# nodes and 64 requests would cost more than the step that follows.
_ROW_BUDGET = 512


class SequentialDrafter:
    """Fills a fixed tree; all index tables are built once, so ``draft`` copies nothing.

    Parameters
    ----------
    heads : MedusaHeads
        Sequential heads, at least as many as the tree is deep.
    tree : TokenTree
    """

    def __init__(self, heads: MedusaHeads, tree: TokenTree) -> None:
        spec = heads.spec
        if not spec.sequential:
            raise ValueError("heads: found independent heads; draft them with top_tokens")
        tree.validate(spec.num_heads, spec.output_size)
        self.heads, self.tree = heads, tree
        self.num_top = tree.max_rank + 1
        # A node's column is its row less one; the root's token has the last one, -1.
        self.columns_per_head = -(-tree.num_rows // tree.max_depth)
        sizes = {tree.num_nodes, *(size for size in (1, 3, 7, 15, 31) if size < tree.num_nodes)}
        self._levels = {size: _levels(tree.cut(size), heads.weight.device) for size in sizes}

    def draft(
        self,
        # [num_reqs, hidden_size], spec.dtype: hidden states of the last verified rows
        hidden: torch.Tensor,
        # [num_reqs] int64: the token that the base model chose there, the tree's root
        root_tokens: torch.Tensor,
        # ids [m] int64 -> [m, hidden_size], the base model's input embeddings
        embed_tokens: Callable[[torch.Tensor], torch.Tensor],
        # [m, hidden_size] -> [m, vocab_size]; None for own lm_heads
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Draft tokens of all nodes, [num_reqs, num_nodes] int64 ids of the base vocabulary.

        Batches whose requests are too many for the whole tree get the token 0 at its last nodes.
        """
        tokens, _ = self.score(hidden, root_tokens, embed_tokens, apply_lm_head)
        return tokens.flatten(1)[:, : self.tree.num_nodes].clamp_(min=0)

    def score(
        self,
        hidden: torch.Tensor,
        root_tokens: torch.Tensor,
        embed_tokens: Callable[[torch.Tensor], torch.Tensor],
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with every node's log probability behind its parent.

        Returns
        -------
        tokens, log_probs : torch.Tensor, [num_reqs, depth, columns_per_head] int64 and float32
            A node in the column of its place, over both dimensions; -1 and -inf where none was
            drafted.
        """
        num_reqs, size = hidden.shape
        width = self.tree.max_depth * self.columns_per_head
        tokens = root_tokens.new_full((num_reqs, width), -1)
        tokens[:, -1] = root_tokens
        log_probs = hidden.new_full((num_reqs, width), float("-inf"), dtype=torch.float32)
        for head, level in enumerate(self._levels[self._num_nodes(num_reqs)], start=1):
            num_parents = level.paths.shape[0]
            path_tokens = tokens[:, level.paths].reshape(num_reqs * num_parents, head)
            embedded = embed_tokens(path_tokens.flatten()).to(hidden.dtype)
            states = hidden.repeat_interleave(num_parents, dim=0)
            path = embedded.view(-1, head, size)
            top = top_tokens_of_head(self.heads, head, states, path, self.num_top, apply_lm_head)
            for table, found in zip((tokens, log_probs), top, strict=True):
                by_parent = found.view(num_reqs, num_parents, self.num_top)
                table[:, level.columns] = by_parent[:, level.parents, level.ranks]
        shape = (num_reqs, self.tree.max_depth, self.columns_per_head)
        return tokens.view(shape), log_probs.view(shape)

    def _num_nodes(self, num_reqs: int) -> int:
        """Nodes of each tree in a batch of so many requests."""
        affordable = max(1, _ROW_BUDGET // max(1, num_reqs) - 1)
        return min((s for s in self._levels if s >= affordable), default=self.tree.num_nodes)


class ChosenSequentialDrafter:
    """Chooses each request's best nodes among those of a fixed tree, at every step.

    Parameters
    ----------
    drafter : SequentialDrafter
        Drafts the tree of ``tree_batch``, the pool.
    tree_batch : TreeBatch
        Whose tables the trees are written to; requests that it calls fixed keep its tree.
    lookup : PromptLookup, optional
        Proposes one more path of every request.
    """

    def __init__(
        self,
        drafter: SequentialDrafter,
        tree_batch: TreeBatch,
        lookup: PromptLookup | None = None,
    ):
        self.drafter, tree = drafter, tree_batch.tree
        # Every node has a column of its own, which is its place, so that both tables are one.
        _, ancestors = candidate_tables(tree.paths, tree.max_depth, tree.max_rank + 1)
        self.chooser = TreeChooser(tree_batch, ancestors, ancestors, range(tree.num_nodes), lookup)

    def draft(
        self,
        out: torch.Tensor,  # [num_reqs, num_nodes] int64
        slots: torch.Tensor,  # [num_reqs] int64, negative: no request
        hidden: torch.Tensor,  # and the rest as SequentialDrafter.draft
        root_tokens: torch.Tensor,
        embed_tokens: Callable[[torch.Tensor], torch.Tensor],
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Write every request's next tree into its slot's tables, and its drafts to ``out``."""
        tokens, log_probs = self.drafter.score(hidden, root_tokens, embed_tokens, apply_lm_head)
        self.chooser.choose(out, tokens, log_probs, slots)
        # Nodes that were not drafted come last, but something must be embedded there.
        out.clamp_(min=0)


class _Level:
    """Index tables of the nodes at one depth."""

    def __init__(self, tree: TokenTree, depth: int, device: torch.device) -> None:
        rows = [row for row in range(tree.num_rows) if tree.depths[row] == depth]
        parents = sorted({tree.parents[row] for row in rows})

        def table(values: list) -> torch.Tensor:
            return torch.tensor(values, device=device)

        # [num_parents, depth]: columns from the root to the parent
        self.paths = table([[row - 1 for row in tree.path_to(parent)] for parent in parents])
        # [nodes of the depth] each: a child's column, its parent's place in `paths`, its rank
        self.columns = table([row - 1 for row in rows])
        self.parents = table([parents.index(tree.parents[row]) for row in rows])
        self.ranks = table([tree.ranks[row] for row in rows])


def _levels(tree: TokenTree, device: torch.device) -> list[_Level]:
    return [_Level(tree, depth, device) for depth in range(1, tree.max_depth + 1)]


def top_tokens_of_head(
    heads: MedusaHeads,
    head: int,
    # [n, hidden_size], spec.dtype
    hidden: torch.Tensor,
    # [n, head, hidden_size]: root's token first
    path_embeddings: torch.Tensor,
    num_top: int,
    apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely tokens of one head (from 1) on given paths, and their log probabilities.

    Returns
    -------
    tokens, log_probs : torch.Tensor, [n, num_top] int64 ids of the base vocabulary and float32
    """
    spec, index = heads.spec, head - 1
    states = hidden
    for layer in range(spec.num_layers):
        bias = None if heads.bias is None else heads.bias[layer, index]
        update = functional.linear(states, heads.weight[layer, index], bias)
        if layer == 0:
            update = update + path_update(heads.path_weight, path_embeddings, head)
        states = states + functional.silu(update)
    # [output_size]; a common map serves every head
    token_map = None
    if heads.token_map is not None:
        token_map = heads.token_map[min(index, spec.num_token_maps - 1)]
    logits = _logits(heads, index, states, token_map, apply_lm_head)
    tokens = torch.empty(hidden.shape[0], 1, num_top, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    token_map = None if token_map is None else token_map[None]
    top_tokens(tokens, log_probs, logits[:, None], token_map=token_map)
    return tokens[:, 0], log_probs[:, 0]


def _logits(
    heads: MedusaHeads,
    index: int,
    states: torch.Tensor,
    token_map: torch.Tensor | None,
    apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    # -> [n, output_size]
    if heads.lm_head is not None:
        if heads.lm_head_down is not None:
            states = functional.linear(states, heads.lm_head_down[index])
        return functional.linear(states, heads.lm_head[min(index, heads.spec.num_lm_heads - 1)])
    if apply_lm_head is None:
        raise ValueError("apply_lm_head: found None, but these heads have no lm_head of their own")
    logits = apply_lm_head(states)
    return logits if token_map is None else logits[:, token_map]
