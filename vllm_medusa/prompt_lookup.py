"""What a request's own history proposes, as one more path of its tree (prompt lookup).

Text repeats itself: names, quotes, code, lists, and small models' loops.  Where the newest
tokens stood before, what followed them then is a guess for free, as deep as one likes.  How
often it holds depends on how many tokens matched, so its nodes have prices as the heads' have,
and the likeliest of both make the tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_medusa.kernels import MAX_MATCH, Chains, LookupWorkspace, lookup_chain

# Share of the next tokens that were right, by how many tokens matched: greedy answers of
# SmolLM2-135M-Instruct to MT-Bench's first turns, 17,145 tokens. What was right before counts as
# matched at the next place: behind a match of two, one and two tokens on, .65 and .69 were right.
SHARES = (0.22, 0.52, 0.63, 0.70, 0.80, 0.80, 0.82, 0.95)


def chain_costs(length: int, shares: Sequence[float] = SHARES) -> np.ndarray:
    """Negative log probability of a continuation's first tokens, by the tokens that matched.

    Parameters
    ----------
    length : int
        Tokens of the continuation.
    shares : sequence of float
        Share of the next tokens that are right behind a match of 1, 2, .. :data:`MAX_MATCH`.

    Returns
    -------
    numpy.ndarray, [MAX_MATCH + 1, length] float32
        Row 0, no match: infinite. Never falls along a row.

    Examples
    --------
    >>> np.exp(-chain_costs(2)[[1, 2]]).round(3).tolist()
    [[0.22, 0.114], [0.52, 0.328]]
    """
    costs = np.full((MAX_MATCH + 1, length), np.inf, np.float32)
    for match in range(1, MAX_MATCH + 1):
        matched = np.minimum(match + np.arange(length), MAX_MATCH)
        costs[match] = np.cumsum(-np.log(np.take(shares, matched - 1)), dtype=np.float32)
    return costs


class PromptLookup:
    """Looks up every request's continuation on the device; nothing is allocated in a step.

    Parameters
    ----------
    history : torch.Tensor
        ``[max_num_reqs, max_model_len]`` int32, vLLM's tokens by request slot.
    lengths : torch.Tensor
        ``[max_num_reqs]`` int32, how many of them there are.
    length : int
        Tokens of a continuation.
    vocab_size : int
        Ids that the target embeds; a history may hold others in the place of images.
    """

    def __init__(
        self, history: torch.Tensor, lengths: torch.Tensor, length: int, vocab_size: int
    ):
        self.history, self.lengths, self.vocab_size = history, lengths, vocab_size
        device, num_reqs = lengths.device, lengths.shape[0]
        self.chains = Chains(
            torch.full((num_reqs, length), -1, dtype=torch.int64, device=device),
            torch.zeros(num_reqs, dtype=torch.int32, device=device),
            torch.from_numpy(chain_costs(length)).to(device),
        )
        self.workspace = LookupWorkspace.allocate(num_reqs, device)

    def find(self, slots: torch.Tensor) -> Chains:
        """Continuations of the requests in ``slots`` [num_reqs], negative: no request."""
        lookup_chain(
            self.chains.tokens,
            self.chains.matches,
            self.history,
            self.lengths,
            slots,
            vocab_size=self.vocab_size,
            workspace=self.workspace,
        )
        return self.chains
