"""Drafts a tree with sequential heads: level by level, each head seeing its node's path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from vllm_medusa.heads import MedusaHeads
from vllm_medusa.heads_path import path_update
from vllm_medusa.kernels import draft_tree
from vllm_medusa.tree import TokenTree


class SequentialDrafter:
    """Fills a static tree; all index tables are built once, so ``draft`` copies nothing.

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
        device = heads.weight.device
        # per depth: rows (0 = root) with children, their paths of rows, and per child its row,
        # its parent's place among those rows, and its rank
        self._levels = [_Level(tree, depth, device) for depth in range(1, tree.max_depth + 1)]

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
        """Draft tokens of all nodes, [num_reqs, num_nodes] int64 ids of the base vocabulary."""
        num_reqs, size = hidden.shape
        tokens = root_tokens.new_zeros(num_reqs, self.tree.num_rows)
        tokens[:, 0] = root_tokens
        for head, level in enumerate(self._levels, start=1):
            num_parents = level.paths.shape[0]
            path_tokens = tokens[:, level.paths].reshape(num_reqs * num_parents, head)
            embedded = embed_tokens(path_tokens.flatten()).to(hidden.dtype)
            states = hidden.repeat_interleave(num_parents, dim=0)
            path = embedded.view(-1, head, size)
            top = top_tokens_of_head(self.heads, head, states, path, self.num_top, apply_lm_head)
            top = top.view(num_reqs, num_parents, self.num_top)
            tokens[:, level.rows] = top[:, level.parents, level.ranks]
        return tokens[:, 1:]


class _Level:
    """Index tables of the nodes at one depth."""

    def __init__(self, tree: TokenTree, depth: int, device: torch.device) -> None:
        rows = [row for row in range(tree.num_rows) if tree.depths[row] == depth]
        parents = sorted({tree.parents[row] for row in rows})
        # [num_parents, depth]: rows from the root to the parent
        self.paths = torch.tensor([tree.path_to(row) for row in parents], device=device)
        # [nodes of the depth] each
        self.rows = torch.tensor(rows, device=device)
        self.parents = torch.tensor([parents.index(tree.parents[r]) for r in rows], device=device)
        self.ranks = torch.tensor([tree.ranks[row] for row in rows], device=device)


def top_tokens_of_head(
    heads: MedusaHeads,
    head: int,
    # [n, hidden_size], spec.dtype
    hidden: torch.Tensor,
    # [n, head, hidden_size]: root's token first
    path_embeddings: torch.Tensor,
    num_top: int,
    apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Most likely tokens of one head (from 1) on given paths, [n, num_top] int64 base ids."""
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
    ids = torch.empty(hidden.shape[0], num_top, dtype=torch.int64, device=logits.device)
    columns = torch.arange(num_top, device=logits.device)
    token_map = None if token_map is None else token_map[None]
    draft_tree(ids, logits[:, None], columns, num_top=num_top, token_map=token_map)
    return ids


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
