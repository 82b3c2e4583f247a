"""Batches of whole conversations with the labels of the lm_head and of every head."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import label_rows


@dataclass(frozen=True)
class SequenceBatch:
    """Right-padded conversations. Which rows count is told by position, never by token id."""

    # [conversations, length] int64
    input_ids: Tensor
    # [rows] int64 into the flattened [conversations * length] positions
    rows: Tensor
    # [rows, num_heads + 1] int64, column 0 the lm_head's; IGNORE past the answer
    labels: Tensor

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The same batch on another device."""
        return SequenceBatch(
            self.input_ids.to(device), self.rows.to(device), self.labels.to(device)
        )


@dataclass
class SequenceData:
    """Conversations fit for training, the same order for the same seed.

    Parameters
    ----------
    conversations : ConversationSet
    num_heads : int
    max_length : int
        Longer conversations are cut at their end.
    """

    conversations: ConversationSet
    num_heads: int
    max_length: int
    # usable conversations
    indices: np.ndarray = field(init=False)
    # what was cut or left out -> conversations
    counts: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = Counter()
        usable = []
        for i in range(len(self.conversations)):
            self.counts["cut"] += len(self.conversations.tokens(i)) > self.max_length
            if self.conversations.mask(i)[1 : self.max_length].any():
                usable.append(i)
            else:
                self.counts["no answer token left"] += 1
        self.indices = np.array(usable, np.int64)
        if not usable:
            raise ValueError(
                f"none of {len(self.conversations)} conversations has an answer token within "
                f"max_length {self.max_length}; expected answers marked by `vllm-medusa distill`"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def step_indices(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Conversations of one step of an endless run; every epoch is shuffled anew."""
        per_epoch = self.steps_per_epoch(batch_size)
        epoch, batch = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(self.indices)
        return order[batch * batch_size : (batch + 1) * batch_size]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches of an epoch; the rest comes in another epoch's order."""
        if batch_size > len(self):
            raise ValueError(
                f"batch_size is {batch_size}; expected at most the {len(self)} usable "
                "conversations"
            )
        return len(self) // batch_size

    def batches(self, indices: np.ndarray, micro_batch_size: int) -> Iterator[SequenceBatch]:
        """Forward passes over the conversations ``indices``."""
        for start in range(0, len(indices), micro_batch_size):
            yield self.batch(indices[start : start + micro_batch_size])

    def batch(self, indices: np.ndarray) -> SequenceBatch:
        """One padded forward pass."""
        tokens = [self.conversations.tokens(i)[: self.max_length] for i in indices]
        masks = [self.conversations.mask(i)[: self.max_length] for i in indices]
        length = max(map(len, tokens))
        ids = torch.zeros(len(indices), length, dtype=torch.int64)
        rows, labels = [], []
        for place, (row, mask) in enumerate(zip(tokens, masks, strict=True)):
            ids[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
            positions, table = label_rows(row, mask, self.num_heads)
            rows.append(place * length + positions)
            labels.append(table)
        return SequenceBatch(
            ids, torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(labels))
        )
