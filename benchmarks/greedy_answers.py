"""Greedy answers to test questions: by vLLM, or by a model that is in memory already."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_medusa.training.chat_format import ChatFormat
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.prompt_files import Prompt, choose_prompts, read_prompts
from vllm_medusa.training.served_answers import serve_prompts


@dataclass(frozen=True)
class TestAnswers:
    """Greedy answers to test questions, and the question of each."""

    answers: ConversationSet
    # [answers] int64
    questions: np.ndarray

    def save(self, path: Path) -> None:
        """Write the answers to ``path`` and their questions beside it."""
        self.answers.save(path)
        np.save(path.with_suffix(".npy"), self.questions)

    @classmethod
    def load(cls, path: Path) -> TestAnswers:
        """What :meth:`save` wrote."""
        return cls(ConversationSet.load(path), np.load(path.with_suffix(".npy")))


def chosen_questions(path: Path, limit: int, turns: int) -> list[Prompt]:
    """The first turns of questions, spread over the categories."""
    return [
        dataclasses.replace(prompt, turns=prompt.turns[:turns])
        for prompt in choose_prompts(read_prompts(path).prompts, limit)
    ]


def served_answers(
    path: Path, questions: Sequence[Prompt], engine: dict[str, Any], max_tokens: int
) -> TestAnswers:
    """Read ``path``, or let vLLM answer all turns and write it."""
    if not path.exists():
        run = serve_prompts(engine, questions, {"temperature": 0.0, "max_tokens": max_tokens})
        pairs = ((a.prompt_ids, a.token_ids) for a in run.answers)
        owners = np.array([a.prompt_index for a in run.answers], np.int64)
        TestAnswers(ConversationSet.from_pairs(pairs), owners).save(path)
    return TestAnswers.load(path)


def own_answers(
    path: Path, questions: Sequence[Prompt], model: Any, tokenizer: Any, max_tokens: int
) -> TestAnswers:
    """Read ``path``, or let a transformers model answer the first turns at once and write it.

    An engine would take longer to start than this takes, and memory beside a training.
    """
    if not path.exists():
        chat = ChatFormat(tokenizer)
        prompts = [chat.answer_prompt([{"role": "user", "content": q.turns[0]}]) for q in questions]
        answers = continue_greedily(model, prompts, max_tokens, sorted(chat.end_ids))
        pairs = zip(prompts, answers, strict=True)
        TestAnswers(ConversationSet.from_pairs(pairs), np.arange(len(prompts))).save(path)
    return TestAnswers.load(path)


@torch.inference_mode()
def continue_greedily(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, end_ids: Sequence[int]
) -> list[list[int]]:
    """Every prompt's likeliest next tokens, up to and with the first of ``end_ids``."""
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    found = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_tokens,
        do_sample=False, eos_token_id=list(end_ids), pad_token_id=end_ids[0],
        # Of the checkpoint's own settings none may change what is likeliest.
        repetition_penalty=1.0, num_beams=1,
    )  # fmt: skip
    answers = found[:, width:].tolist()
    return [_until_end(answer, set(end_ids)) for answer in answers]


def _until_end(answer: list[int], end_ids: set[int]) -> list[int]:
    for place, token in enumerate(answer, 1):
        if token in end_ids:
            return answer[:place]
    return answer
