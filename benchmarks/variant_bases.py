"""A base model with what its heads are trained and tested on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from greedy_answers import TestAnswers
from torch import Tensor
from torch.nn import functional

from vllm_medusa.training.base_model import embedding_weight, lm_head_weight
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import HiddenStateSet, extract_hidden_states
from vllm_medusa.training.loss import IGNORE

# Columns of labels: heads that any variant may have. One table for all, so that the compiled
# loss sees one layout.
MOST_HEADS = 5
_CHUNK = 4096


@dataclass
class Base:
    """A model, its hidden states on training and held-out answers, and its test answers."""

    name: str
    model: Any
    train: ConversationSet
    held_out: ConversationSet
    # lets the model answer the test questions
    answer: Callable[[Any], TestAnswers]
    batch_tokens: int
    seconds: float = 0.0
    _sets: dict[str, HiddenStateSet] = field(default_factory=dict)

    @property
    def lm_head(self) -> Tensor:
        return lm_head_weight(self.model)

    @property
    def embeddings(self) -> Tensor:
        return embedding_weight(self.model)

    @cached_property
    def test(self) -> TestAnswers:
        """The model's greedy answers to the test questions."""
        return self.answer(self.model)

    def has_hidden(self, which: str) -> bool:
        """Whether these hidden states are there already."""
        return which in self._sets

    def hidden(self, which: str) -> HiddenStateSet:
        """Hidden states of ``train``, ``held_out`` or ``test``, computed at the first call."""
        if which not in self._sets:
            answers = self.test.answers if which == "test" else getattr(self, which)
            started = time.monotonic()
            self._sets[which] = extract_hidden_states(
                self.model, answers, MOST_HEADS, self.batch_tokens
            )
            self.seconds += time.monotonic() - started
        return self._sets[which]

    def drop_training_data(self) -> None:
        """Give the training rows' memory back."""
        self._sets.pop("train", None)

    @torch.inference_mode()
    def nats_per_token(self) -> float:
        """Mean negative log likelihood of the held-out answers' tokens."""
        data, total, count = self.hidden("held_out"), 0.0, 0
        for start in range(0, data.num_rows, _CHUNK):
            rows = slice(start, start + _CHUNK)
            labels = data.labels[rows, 0].long()
            logits = functional.linear(data.hidden[rows], self.lm_head).float()
            total += float(
                functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
            )
            count += int((labels != IGNORE).sum())
        return total / max(count, 1)


def cut_share(data: HiddenStateSet, share: float) -> HiddenStateSet:
    """The first conversations' rows, which is a random share: the split shuffled them."""
    if share >= 1:
        return data
    return rows_of(data, 0, max(1, round((len(data.offsets) - 1) * share)))


def first_answers(answers: ConversationSet, share: float) -> ConversationSet:
    """A share of the conversations; the split shuffled them."""
    return answers.select(np.arange(max(1, round(len(answers) * share))))


def rows_of(data: HiddenStateSet, first: int, last: int) -> HiddenStateSet:
    """Conversations ``first`` to ``last - 1``."""
    offsets = data.offsets[first : last + 1]
    rows = slice(int(offsets[0]), int(offsets[-1]))
    return HiddenStateSet(data.hidden[rows], data.labels[rows], offsets - offsets[0])


def halves(data: HiddenStateSet) -> tuple[HiddenStateSet, HiddenStateSet]:
    """Conversations to calibrate trees on, and others to test them on."""
    count = len(data.offsets) - 1
    first, second = itertools.pairwise((0, max(1, count // 2), count))
    return rows_of(data, *first), rows_of(data, *second)
