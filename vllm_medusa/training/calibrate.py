"""Which rank each head gives the right token, and the static tree that follows from it."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vllm_medusa.heads import MedusaHeads
from vllm_medusa.training.base_model import embedding_weight
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import HiddenStateSet, extract_hidden_states
from vllm_medusa.training.loss import IGNORE
from vllm_medusa.training.path_tokens import path_embeddings
from vllm_medusa.training.progress import progress_bar
from vllm_medusa.training.simulate import Path_, StepCount, accepted_depths, visited_rows
from vllm_medusa.training.trainable_heads import TrainableHeads

# Rank of a label that a head does not have among its top tokens.
MISSED = -1


@dataclass(frozen=True)
class HeadRanks:
    """Ranks of the right tokens under every head, row by row."""

    # [rows, num_heads] int16: 0 is the head's first choice, MISSED beyond max_rank or no label
    ranks: np.ndarray
    # [rows, num_heads] bool: whether the head has a label in this row
    has_label: np.ndarray
    # [num_conversations + 1] int64, conversation -> first row
    offsets: np.ndarray
    max_rank: int
    # [rows, num_heads, max_rank] float32 of every head's best tokens, where asked for
    log_probs: np.ndarray | None = None

    def accuracies(self) -> np.ndarray:
        """Share of labels at each rank, [num_heads, max_rank].

        Each head is divided by the number of its own labels: near an answer's end later heads
        have fewer, and a common divisor would under-rate them.
        """
        counts = np.maximum(self.has_label.sum(axis=0), 1)
        hits = np.stack([(self.ranks == rank).sum(axis=0) for rank in range(self.max_rank)], axis=1)
        return hits / counts[:, None]


# Logits that exist at once while ranking: 2**27 take 0.5 GB in float32.
_LOGITS_AT_ONCE = 2**27


@torch.inference_mode()
def rank_labels(
    heads: TrainableHeads | MedusaHeads,
    data: HiddenStateSet,
    lm_head_weight: Tensor,
    max_rank: int = 10,
    batch_rows: int | None = None,
    embeddings: Tensor | None = None,
    with_log_probs: bool = False,
) -> HeadRanks:
    """Rank of every head's label among the head's ``max_rank`` most likely tokens.

    The ranking runs through ``MedusaHeads.top_tokens``, on the logits that serving drafts from.

    Parameters
    ----------
    heads : TrainableHeads or MedusaHeads
    data : HiddenStateSet
        Labels for at least as many heads as ``heads`` has.
    lm_head_weight : Tensor
        [vocab, hidden], dtype of ``data.hidden``.
    embeddings : Tensor, optional
        [vocab, hidden] input embeddings, for sequential heads.
    with_log_probs : bool
        Also return the log probabilities of those tokens, over the heads' vocabulary.
    """
    if isinstance(heads, TrainableHeads):
        weights = heads.to_weights(lm_head_weight.shape[0], data.hidden.dtype)
        heads = MedusaHeads.from_weights(weights, data.hidden.device)
    num_heads = heads.spec.num_heads
    max_rank = min(max_rank, heads.spec.output_size or lm_head_weight.shape[0])
    batch_rows = batch_rows or max(1, _LOGITS_AT_ONCE // (num_heads * lm_head_weight.shape[0]))
    ranks = np.full((data.num_rows, num_heads), MISSED, np.int16)
    shape = (data.num_rows, num_heads, max_rank)
    log_probs = np.empty(shape, np.float32) if with_log_probs else None
    labels = data.labels[:, 1 : num_heads + 1].long()

    weight_dtype = lm_head_weight.dtype

    def apply_lm_head(states: Tensor) -> Tensor:
        return functional.linear(states, lm_head_weight)

    with progress_bar("ranking", data.num_rows) as advance:
        for start in range(0, data.num_rows, batch_rows):
            rows = slice(start, min(start + batch_rows, data.num_rows))
            path = None
            if heads.spec.sequential:
                path = path_embeddings(data.labels[rows], num_heads, embeddings).to(weight_dtype)
            top = heads.top_tokens(data.hidden[rows], max_rank, apply_lm_head, path)
            hits = top == labels[rows].unsqueeze(2)
            rank = torch.where(hits.any(dim=2), hits.int().argmax(dim=2), MISSED)
            ranks[rows] = rank.to(torch.int16).cpu().numpy()
            if log_probs is not None:
                logits = heads.draft_logits(data.hidden[rows], apply_lm_head, path).float()
                best = logits.log_softmax(-1).topk(max_rank, dim=-1).values
                log_probs[rows] = best.cpu().numpy()
            advance(rows.stop - start)
    has_label = (labels != IGNORE).cpu().numpy()
    return HeadRanks(ranks, has_label, data.offsets, max_rank, log_probs)


def rank_answers(
    model: Any,
    heads: MedusaHeads | TrainableHeads,
    answers: ConversationSet,
    max_rank: int,
    with_log_probs: bool = False,
) -> HeadRanks:
    """Run the base model over the answers and rank the right tokens under every head."""
    data = extract_hidden_states(model, answers, heads.spec.num_heads)
    lm_head = model.get_output_embeddings().weight.detach()
    embeddings = embedding_weight(model) if heads.spec.sequential else None
    return rank_labels(
        heads, data, lm_head, max_rank, embeddings=embeddings, with_log_probs=with_log_probs
    )


def joint_best_first(
    # [rows, num_heads] int, MISSED where wrong
    ranks: np.ndarray,
    num_nodes: int,
) -> list[tuple[Path_, float]]:
    """The ``num_nodes`` paths that are right most often, each with its frequency.

    A path counts where *all* its ranks are right at once, as the served tree needs it; products
    of per-head accuracies (paper 2.3.3) assume heads err independently, which they do not. A
    path is never right more often than its parent, so the most frequent paths form a tree, and
    every shorter list of them is the best tree of that size.

    Examples
    --------
    >>> joint_best_first(np.array([[0, 0], [0, 1], [1, -1], [0, 0]]), 2)
    [((0,), 0.75), ((0, 0), 0.5)]
    """
    counts: Counter[Path_] = Counter()
    alive = np.ones(len(ranks), bool)
    for depth in range(1, ranks.shape[1] + 1):
        alive = alive & (ranks[:, depth - 1] >= 0)
        paths, hits = np.unique(ranks[alive, :depth], axis=0, return_counts=True)
        # Only a frequent path can be among the best; rare ones are not worth a Python object.
        for i in np.argsort(-hits, kind="stable")[:num_nodes]:
            counts[tuple(int(rank) for rank in paths[i])] = int(hits[i])
    ordered = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return [(path, counts[path] / len(ranks)) for path in ordered[:num_nodes]]


@dataclass(frozen=True)
class CalibratedTree:
    """A best-first tree, its nodes' frequencies and its step count on the calibration data."""

    paths: tuple[Path_, ...]
    frequencies: tuple[float, ...]
    count: StepCount


def search_tree(ranks: HeadRanks, num_nodes: int = 63, rounds: int = 4) -> CalibratedTree:
    """Best static tree for the rows at which decoding really stops.

    The first round counts every row. But a tree that is right skips rows, and those left are
    harder, so each further round counts only the rows visited by the last tree; the tree with
    the most tokens per step on the calibration answers wins.
    """
    if num_nodes < 1 or rounds < 1:
        raise ValueError(f"num_nodes is {num_nodes}, rounds {rounds}; expected at least 1 each")
    rows = np.arange(len(ranks.ranks))
    best: CalibratedTree | None = None
    for _ in range(rounds):
        found = joint_best_first(ranks.ranks[rows], num_nodes)
        paths = tuple(path for path, _ in found)
        rows, count = visited_rows(accepted_depths(ranks.ranks, paths), ranks.offsets)
        if best is None or count.tokens_per_step > best.count.tokens_per_step:
            best = CalibratedTree(paths, tuple(value for _, value in found), count)
    return best
