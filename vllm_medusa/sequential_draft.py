"""Drafts a tree with sequential heads: level by level, each head seeing its node's path.

Every node of a fixed tree is drafted with its log probability behind its own path.  That tree is
what is verified, or the pool from which each request's best nodes are taken at every step, with
what its history proposes (:class:`vllm_medusa.tree_chooser.TreeChooser`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_medusa.kernels import DraftWorkspace, DrawNoise, embed_paths, top_tokens
from vllm_medusa.prompt_lookup import PromptLookup
from vllm_medusa.sequential_heads import SequentialHeads
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.tree_candidates import candidate_tables
from vllm_medusa.tree_chooser import TreeChooser

# Rows that the requests of a batch share when it is drafted: twice what a step verifies by
# default, so that no width that pays lacks its nodes. A head's product over all parents of 63
# nodes and 64 requests would cost more than the step that follows.
_ROW_BUDGET = 512

# The base model's input embeddings, [at least vocab_size, hidden_size], or what looks them up:
# ids [m] int64 -> [m, hidden_size].
Embeddings = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


class SequentialDrafter:
    """Fills a fixed tree; all tables are allocated once, so ``score`` only launches kernels.

    Parameters
    ----------
    heads : SequentialHeads
        At least as many as the tree is deep.
    tree : TokenTree
    max_num_reqs : int
        Requests of the largest batch.
    """

    def __init__(self, heads: SequentialHeads, tree: TokenTree, max_num_reqs: int) -> None:
        spec, device = heads.spec, heads.first_layers[0].weight.device
        tree.validate(spec.num_heads, spec.output_size)
        self.heads, self.tree = heads, tree
        # A node's column is its row less one.
        self.columns_per_head = -(-tree.num_rows // tree.max_depth)
        width = tree.max_depth * self.columns_per_head
        sizes = {tree.num_nodes, *(size for size in (1, 3, 7, 15, 31) if size < tree.num_nodes)}
        num_top = tree.max_rank + 1
        self._cuts = {
            size: _CutTree(tree.cut(size), num_top, (max_num_reqs, width), device) for size in sizes
        }
        most_rows = max(
            num_reqs * self._cut_for(num_reqs).most_parents
            for num_reqs in range(1, max_num_reqs + 1)
        )
        self.workspace = DraftWorkspace.allocate(most_rows, spec.output_size, device)

    def draft(
        self,
        # [num_reqs, num_nodes] int64
        out: torch.Tensor,
        # [num_reqs, hidden_size], spec.dtype: hidden states of the last verified rows
        hidden: torch.Tensor,
        # [num_reqs] int64: the token that the base model chose there, the tree's root
        root_tokens: torch.Tensor,
        embeddings: Embeddings,
        # [m, hidden_size] -> [m, vocab_size]; None for own lm_heads
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: DrawNoise | None = None,
    ) -> None:
        """Write draft tokens of all nodes, ids of the base vocabulary, to ``out``.

        Batches whose requests are too many for the whole tree get the token 0 at its last nodes.
        """
        tokens, _ = self.score(hidden, root_tokens, embeddings, apply_lm_head, noise)
        torch.clamp(tokens.flatten(1)[:, : self.tree.num_nodes], min=0, out=out)

    def score(
        self,
        hidden: torch.Tensor,
        root_tokens: torch.Tensor,
        embeddings: Embeddings,
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: DrawNoise | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with every node's log probability behind its parent.

        Returns
        -------
        tokens, log_probs : torch.Tensor, [num_reqs, depth, columns_per_head] int64 and float32
            A node in the column of its place, over both dimensions; -1 and -inf where none was
            drafted. Tables of this drafter, to be read only, and until it drafts again.
        """
        num_reqs = hidden.shape[0]
        cut = self._cut_for(num_reqs)
        tokens, log_probs = cut.tokens[:num_reqs], cut.log_probs[:num_reqs]
        for head, level in enumerate(cut.levels, start=1):
            inputs = self._inputs(level, hidden, tokens, root_tokens, embeddings)
            logits = self.heads.logits(head, inputs, apply_lm_head)
            top_tokens(
                tokens,
                log_probs,
                logits.unflatten(0, (num_reqs, len(level.paths))),
                token_map=self.heads.map_of(head),
                columns=level.columns,
                noise=None if noise is None else noise._replace(depth=head, depth_step=0),
                workspace=self.workspace,
            )
        shape = (num_reqs, self.tree.max_depth, self.columns_per_head)
        return tokens.view(shape), log_probs.view(shape)

    def levels_for(self, num_reqs: int) -> list[_Level]:
        """Index tables by which a batch of so many requests is drafted."""
        return self._cut_for(num_reqs).levels

    def _inputs(
        self,
        level: _Level,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        root_tokens: torch.Tensor,
        embeddings: Embeddings,
    ) -> torch.Tensor:
        # -> [num_reqs * num_parents, 1 + depth, hidden_size]
        paths = level.paths
        if not isinstance(embeddings, torch.Tensor):
            # A table of its own for this level, with a row for every token of every path.
            known = torch.cat([tokens, root_tokens[:, None]], dim=1)
            embeddings = embeddings(known[:, paths].flatten())
            tokens = torch.arange(len(embeddings), device=tokens.device).view(len(tokens), -1)
            paths = level.places
        num_parents, depth = paths.shape
        shape = (len(hidden) * num_parents, 1 + depth, hidden.shape[1])
        inputs = hidden.new_empty(shape)
        embed_paths(inputs, hidden, tokens, root_tokens, paths, embeddings)
        return inputs

    def _cut_for(self, num_reqs: int) -> _CutTree:
        """What is drafted of the tree in a batch of so many requests."""
        affordable = max(1, _ROW_BUDGET // max(1, num_reqs) - 1)
        size = min((s for s in self._cuts if s >= affordable), default=self.tree.num_nodes)
        return self._cuts[size]


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
        self.chooser = TreeChooser(
            tree_batch, ancestors, ancestors, range(tree.num_nodes), lookup
        )

    def draft(
        self,
        out: torch.Tensor,  # [num_reqs, num_nodes] int64
        slots: torch.Tensor,  # [num_reqs] int64, negative: no request
        hidden: torch.Tensor,  # and the rest as SequentialDrafter.draft
        root_tokens: torch.Tensor,
        embeddings: Embeddings,
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: DrawNoise | None = None,
    ) -> None:
        """Write every request's next tree into its slot's tables, and its drafts to ``out``."""
        tokens, log_probs = self.drafter.score(
            hidden, root_tokens, embeddings, apply_lm_head, noise
        )
        self.chooser.choose(out, tokens, log_probs, slots)
        # Nodes that were not drafted come last, but something must be embedded there.
        out.clamp_(min=0)


class _CutTree:
    """The first nodes of a tree, and the tables that they are drafted to.

    Every draft writes all columns of its nodes, so that the others never change.
    """

    def __init__(
        self, tree: TokenTree, num_top: int, shape: tuple[int, int], device: torch.device
    ) -> None:
        depths = range(1, tree.max_depth + 1)
        self.levels = [_Level(tree, depth, num_top, device) for depth in depths]
        self.most_parents = max(len(level.paths) for level in self.levels)
        # [max_num_reqs, depth * columns_per_head]
        self.tokens = torch.full(shape, -1, device=device)
        self.log_probs = torch.full(shape, float("-inf"), dtype=torch.float32, device=device)


class _Level:
    """Index tables of the nodes at one depth."""

    def __init__(self, tree: TokenTree, depth: int, num_top: int, device: torch.device) -> None:
        rows = [row for row in range(tree.num_rows) if tree.depths[row] == depth]
        parents = sorted({tree.parents[row] for row in rows})
        columns = torch.full((len(parents), num_top), -1, dtype=torch.int32)
        for row in rows:
            columns[parents.index(tree.parents[row]), tree.ranks[row]] = row - 1
        # [num_parents, depth] int64: columns from the root, which has none (-1), to the parent
        paths = [[row - 1 for row in tree.path_to(parent)] for parent in parents]
        self.paths = torch.tensor(paths, device=device)
        # [num_parents, depth] int64: places in `paths` itself
        self.places = torch.arange(self.paths.numel(), device=device).view(self.paths.shape)
        # [num_parents, num_top] int32: a child's column; -1 where the tree has none of that rank
        self.columns = columns.to(device)
