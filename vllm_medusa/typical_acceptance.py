"""Typical acceptance (Medusa paper, section 2.3.1): accept what the model finds plausible.

A node is accepted if the model gives its token, in the context of its path, more than
``min(epsilon, delta * exp(-entropy))``; the longest path of accepted nodes wins, among
equals the likeliest.  The root is the sampler's own token and always stands; the token
behind the path is drawn by the sampler as usual.  Not lossless, so off by default.

The choice is handed to the same walk as exact acceptance: rows on the chosen path are
given their child's token as if it had been drawn, and all other nodes lose theirs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_medusa.request_options import RequestOptions
from vllm_medusa.tree_batch import TreeBatch


class Scores(NamedTuple):
    """What the model thinks of the nodes of some requests, row after row."""

    log_probs: torch.Tensor  # [num_rows] float32, of the row's token at its parent
    accepted: torch.Tensor  # [num_rows] bool, by the row's own probability alone


def score_rows(
    logits: torch.Tensor,  # [num_rows, vocab_size], after all sampling parameters
    tokens: torch.Tensor,  # [num_rows], each row's own token, negative: no node
    parents: torch.Tensor,  # [num_rows] int64, row of the parent
    epsilon: torch.Tensor,  # [num_rows] float32
    delta: torch.Tensor,  # [num_rows] float32
) -> Scores:
    """Probability of every row's token at its parent, held against the parent's threshold."""
    log_probs = logits.float().log_softmax(-1)
    entropy = torch.special.entr(log_probs.exp()).sum(-1)
    threshold = torch.minimum(epsilon, delta * (-entropy).exp())
    own = log_probs[parents, tokens.clamp(min=0).long()]
    return Scores(own, (own.exp() > threshold[parents]) & (tokens >= 0))


def mask_bits(
    masks: torch.Tensor,  # [num_reqs, W] int64 words, or [num_reqs, 2, W]
) -> torch.Tensor:
    """``[num_reqs, W, W]`` bool: column j is row i or its ancestor."""
    columns = torch.arange(masks.shape[-1], device=masks.device)
    words = masks.unflatten(0, (-1, 1)) if masks.dim() == 2 else masks
    return ((words[:, columns // 64].mT >> columns % 64) & 1).bool()


def best_rows(
    log_probs: torch.Tensor,  # [num_reqs, W] float32, anything where not accepted
    accepted: torch.Tensor,  # [num_reqs, W] bool, root and missing rows false
    above: torch.Tensor,  # [num_reqs, W, W] bool, column j is row i or its ancestor
    depths: torch.Tensor,  # [num_reqs, W] int32
) -> torch.Tensor:
    """Row that ends the longest path of accepted nodes, [num_reqs] int64; 0: only the root.

    Among paths of equal length the one with the largest sum of log probabilities.
    """
    # The root always stands and is no part of the sum; a row that is not there reaches nothing.
    stands = torch.cat([torch.ones_like(accepted[:, :1]), accepted[:, 1:]], 1)
    reached = (stands[:, None, :] | ~above).all(-1)
    path_log_probs = (above * log_probs.masked_fill(~accepted, 0.0)[:, None, :]).sum(-1)
    reached_depths = depths.masked_fill(~reached, -1)
    longest = reached_depths == reached_depths.amax(1, keepdim=True)
    return path_log_probs.masked_fill(~longest, -torch.inf).argmax(1)


class TypicalAcceptance:
    """Which requests use the rule, and the rule itself for a batch.

    Attributes
    ----------
    active : numpy.ndarray, [max_num_reqs] bool
        Requests (by slot) that accept typically; greedy ones never do.
    """

    def __init__(self, tree_batch: TreeBatch):
        self.tree_batch = tree_batch
        max_num_reqs = tree_batch.parents.shape[0]
        self.active = np.zeros(max_num_reqs, dtype=bool)
        self.epsilon = torch.zeros(max_num_reqs, dtype=torch.float32, device=tree_batch.device)
        self.delta = torch.zeros_like(self.epsilon)

    def add_request(self, index: int, options: RequestOptions, greedy: bool) -> None:
        """Note what the request in slot ``index`` asks for."""
        self.active[index] = options.typical and not greedy
        if self.active[index]:
            self.epsilon[index] = options.typical_epsilon
            self.delta[index] = options.typical_delta

    def score(
        self,
        logits: torch.Tensor,  # [num_rows, vocab_size]
        tokens: torch.Tensor,  # [num_rows]
        slots: torch.Tensor,  # [num_rows]
        local_pos: torch.Tensor,  # [num_rows] int32
        rows: np.ndarray,  # rows of whole requests that accept typically
    ) -> Scores:
        """Score those of a batch's rows that belong to requests with this rule."""
        if len(rows) < logits.shape[0]:
            index = async_tensor_h2d(rows, device=logits.device)
            logits, tokens = logits[index], tokens[index]
            slots, local_pos = slots[index], local_pos[index]
        slots, place = slots.long(), local_pos.long()
        parents = self.tree_batch.parents[slots, place].clamp(min=0)
        first = torch.arange(len(place), device=place.device) - place
        return score_rows(logits, tokens, first + parents, self.epsilon[slots], self.delta[slots])

    def steer(
        self,
        scores: Scores,
        requests: np.ndarray,  # [num_typical] places in the batch of the requests scored
        drawn: torch.Tensor,  # [num_logits] int64
        tokens: torch.Tensor,  # [num_logits]
        cu_rows: torch.Tensor,  # [num_reqs + 1] int32
        slots: torch.Tensor,  # [num_reqs] int64
        ready: torch.Tensor,  # [num_reqs] bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the walk has to be given to take the chosen paths.

        Returns
        -------
        drawn, tokens, limits : torch.Tensor
            As the walk reads them; ``limits`` [num_reqs] int32.
        """
        batch, num_logits = self.tree_batch, drawn.shape[0]
        places = async_tensor_h2d(requests, device=drawn.device)
        own = slots[places]
        parents, depths = batch.parents[own].long(), batch.depths[own]
        above = mask_bits(batch.masks[own])
        columns = torch.arange(batch.num_rows, device=drawn.device)
        starts = cu_rows[places].long()
        counts = cu_rows[places + 1].long() - starts
        real = columns < counts[:, None]
        nodes = real & (columns > 0)
        # Row of the scores, which hold the rows of these requests only, and of the batch.
        scored = ((counts.cumsum(0) - counts)[:, None] + columns).where(real, 0)
        rows = (starts[:, None] + columns).where(real, 0)
        accepted = scores.accepted[scored] & nodes & ready[places, None]
        best = best_rows(scores.log_probs[scored], accepted, above, depths)[:, None]

        on_path = above.take_along_dim(best[:, :, None], 1)[:, 0]
        chosen = nodes & on_path
        # One more row takes what is to go nowhere.
        parent_rows = (starts[:, None] + parents).where(chosen, num_logits)
        drawn = torch.cat([drawn, drawn.new_zeros(1)])
        drawn = drawn.scatter_(0, parent_rows.flatten(), tokens[rows].flatten().to(drawn.dtype))
        tokens = torch.cat([tokens, tokens.new_zeros(1)])
        tokens[rows.where(nodes & ~on_path, num_logits)] = -1
        limits = torch.full_like(slots, batch.num_rows, dtype=torch.int32)
        limits[places] = depths.gather(1, best)[:, 0]
        return drawn[:num_logits], tokens[:num_logits], limits
