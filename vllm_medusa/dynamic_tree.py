"""A tree per request and per step: the likeliest nodes by the heads' own probabilities.

Independent heads give every path a probability, the product along it (later heads weigh a
little more, see :mod:`vllm_medusa.tree_candidates`).  The best tree of n
nodes is then the n likeliest paths, which two launches find inside the step's CUDA graph: one
takes every head's best tokens with their log probabilities, one chooses among the paths that
can be in such a tree at all and writes the tree into the tables of the request's slot, where
the next step's masks, positions and walk read it.  A third adds what the request's own history
proposes (see :mod:`vllm_medusa.prompt_lookup`).
"""

from __future__ import annotations

import torch

from vllm_medusa.kernels import DraftWorkspace, DrawNoise, top_tokens
from vllm_medusa.prompt_lookup import PromptLookup
from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.tree_candidates import (
    candidate_paths,
    candidate_tables,
    head_ranks,
    head_weights,
)
from vllm_medusa.tree_chooser import TreeChooser


class DynamicDrafter:
    """Chooses and fills trees of independent heads.

    Parameters
    ----------
    tree_batch : TreeBatch
        Whose tables the trees are written to; requests that it calls fixed keep its tree.
    num_heads : int
        Heads that draft, at least as many as that tree is deep.
    vocab_size : int
        Tokens that a head scores.
    lookup : PromptLookup, optional
        Proposes one more path of every request.

    Raises
    ------
    ValueError
        When so few heads and tokens do not fill a tree of that many nodes.
    """

    def __init__(
        self,
        tree_batch: TreeBatch,
        num_heads: int,
        vocab_size: int,
        lookup: PromptLookup | None = None,
    ):
        tree, device = tree_batch.tree, tree_batch.device
        max_num_reqs = tree_batch.parents.shape[0]
        ranks = head_ranks(tree.num_nodes, num_heads, vocab_size)
        num_top = max(*ranks, tree.max_rank + 1)
        paths = candidate_paths(tree.num_nodes, ranks)
        node_columns = [
            (depth - 1) * num_top + rank
            for depth, rank in zip(tree.depths[1:], tree.ranks[1:], strict=True)
        ]
        tables = candidate_tables(paths, num_heads, num_top)
        self.chooser = TreeChooser(tree_batch, *tables, node_columns, lookup)
        self.weights = torch.tensor(head_weights(num_heads), device=device)
        self.workspace = DraftWorkspace.allocate(max_num_reqs * num_heads, vocab_size, device)
        shape = (max_num_reqs, num_heads, num_top)
        self.tokens = torch.empty(shape, dtype=torch.int64, device=device)
        self.log_probs = torch.empty(shape, dtype=torch.float32, device=device)

    def draft(
        self,
        out: torch.Tensor,  # [num_reqs, num_nodes] int64
        logits: torch.Tensor,  # [num_reqs, num_heads, vocab_size]
        slots: torch.Tensor,  # [num_reqs] int64, negative: no request
        token_map: torch.Tensor | None,  # [1 or num_heads, vocab_size] int64
        noise: DrawNoise | None = None,
    ) -> None:
        """Write every request's next tree into its slot's tables, and its drafts to ``out``."""
        top_tokens(
            self.tokens,
            self.log_probs,
            logits,
            weights=self.weights,
            token_map=token_map,
            noise=noise,
            workspace=self.workspace,
        )
        self.chooser.choose(out, self.tokens, self.log_probs, slots)
