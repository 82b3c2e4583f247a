"""Frozen base model -> the hidden states fed to its lm_head, with each head's labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.training.base_model import run_base
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.loss import IGNORE
from vllm_medusa.training.progress import progress_bar
from vllm_medusa.training.sharded_rows import ShardedRows


def label_rows(
    # [length] integers
    tokens: np.ndarray,
    # [length] bool
    answer_mask: np.ndarray,
    num_heads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions whose next token is an answer token, and the labels seen from each.

    Returns
    -------
    positions : [rows] int64
        Position ``t`` where token ``t + 1`` belongs to an answer.
    labels : [rows, num_heads + 1] int64
        Column 0 is the lm_head's token ``t + 1``; column ``k`` is head ``k``'s token
        ``t + k + 1``, or IGNORE where the answer ended before.

    Examples
    --------
    >>> tokens, mask = np.array([5, 6, 7, 8]), np.array([False, False, True, True])
    >>> [part.tolist() for part in label_rows(tokens, mask, 1)]
    [[1, 2], [[7, 8], [8, -100]]]
    """
    positions = np.flatnonzero(answer_mask[1:])
    labels = np.full((len(positions), num_heads + 1), IGNORE, np.int64)
    alive = np.ones(len(positions), bool)
    for k in range(num_heads + 1):
        target = positions + k + 1
        inside = target < len(tokens)
        # Once an answer ended, what follows is another turn: no head can be asked for it.
        alive &= inside & answer_mask[np.where(inside, target, 0)]
        labels[alive, k] = tokens[target[alive]]
    return positions, labels


@dataclass(frozen=True)
class HiddenStateSet:
    """Rows of training data; rows of one conversation are consecutive, in token order."""

    # [rows, hidden], what the lm_head is fed at the row's position
    hidden: Tensor | ShardedRows
    # [rows, num_heads + 1] int32 or int64, column 0: lm_head's token; IGNORE past the answer
    labels: Tensor
    # [num_conversations + 1] int64, conversation -> first row
    offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def num_heads(self) -> int:
        return self.labels.shape[1] - 1

    def batches(
        self, batch_rows: int, seed: int, start_batch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled epoch of full batches ``(hidden, labels)``, column 0 the lm_head's token.

        The order depends on ``seed`` alone, so a resumed run skips to ``start_batch``.
        """
        generator = torch.Generator(self.hidden.device).manual_seed(seed)
        order = torch.randperm(self.num_rows, generator=generator, device=self.hidden.device)
        for batch in range(start_batch, self.num_rows // batch_rows):
            rows = order[batch * batch_rows : (batch + 1) * batch_rows]
            yield self.hidden[rows], self.labels[rows].long()


# Positions and labels of one conversation, as label_rows returns them.
LabelTable = tuple[np.ndarray, np.ndarray]


def label_tables(conversations: ConversationSet, num_heads: int) -> list[LabelTable]:
    """Rows and labels of every conversation; refuses data without a single answer token."""
    tables = [
        label_rows(conversations.tokens(i), conversations.mask(i), num_heads)
        for i in range(len(conversations))
    ]
    if not any(len(positions) for positions, _ in tables):
        raise ValueError(
            f"{len(tables)} conversations hold no answer token behind a prompt; expected answers "
            "marked by `vllm-medusa distill`"
        )
    return tables


def row_offsets(tables: list[LabelTable]) -> np.ndarray:
    """[num_conversations + 1] int64, conversation -> first row."""
    return np.concatenate([[0], np.cumsum([len(positions) for positions, _ in tables])])


def join_labels(tables: list[LabelTable], num_heads: int) -> Tensor:
    """[rows, num_heads + 1] int32 labels of all conversations."""
    empty = np.zeros((0, num_heads + 1), np.int64)
    return torch.from_numpy(np.concatenate([empty, *(t for _, t in tables)]).astype(np.int32))


def _length_batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Conversations of like length together, so that padding stays small."""
    order = np.argsort(lengths, kind="stable")[::-1]
    start = 0
    while start < len(order):
        count = max(1, max_tokens // int(lengths[order[start]]))
        yield order[start : start + count]
        start += count


@torch.inference_mode()
def extract_hidden_states(
    model: Any,
    conversations: ConversationSet,
    num_heads: int,
    max_batch_tokens: int = 65536,
    store_device: torch.device | str | None = None,
) -> HiddenStateSet:
    """Run the base model once over all conversations and keep the answers' hidden states.

    Parameters
    ----------
    model
        A transformers causal language model in evaluation mode; its ``base_model`` ends with the
        final norm, so its output is exactly what the lm_head is fed.
    conversations : ConversationSet
    num_heads : int
        Number of label columns besides the lm_head's own.
    max_batch_tokens : int
        Padded tokens per forward pass.
    store_device : device, optional
        Where the rows are kept; the model's device by default. One row takes 2 * hidden bytes.
    """
    device = next(model.parameters()).device
    store = torch.device(store_device) if store_device is not None else device
    tables = label_tables(conversations, num_heads)
    offsets = row_offsets(tables)
    size = model.config.hidden_size
    hidden = torch.empty(int(offsets[-1]), size, dtype=model.dtype, device=store)
    lengths = np.diff(conversations.offsets)
    with progress_bar("hidden states", len(conversations)) as advance:
        for members in _length_batches(lengths, max_batch_tokens):
            ids = torch.zeros(len(members), int(lengths[members].max()), dtype=torch.long)
            for row, i in enumerate(members):
                ids[row, : lengths[i]] = torch.from_numpy(conversations.tokens(i).astype(np.int64))
            states = run_base(model, ids.to(device))
            source = np.concatenate([row * ids.shape[1] + tables[i][0]
                                     for row, i in enumerate(members)])  # fmt: skip
            target = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in members])
            picked = states.flatten(0, 1)[torch.from_numpy(source).to(device)]
            hidden[torch.from_numpy(target).to(store)] = picked.to(store)
            advance(len(members))
    return HiddenStateSet(hidden, join_labels(tables, num_heads).to(store), offsets)
