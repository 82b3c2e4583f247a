"""Sampled answers of plain vLLM, a seed each, and the same draws made again.

vLLM's V2 sampler draws the token with the largest logit over the temperature plus noise, and that
noise is a function of the request's seed, the row's position and the token's id.  Whoever knows the
logits of a row can therefore draw its token again, whichever engine served it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from greedy_answers import TestAnswers

from vllm_medusa.kernels import DrawNoise
from vllm_medusa.training.chat_format import ChatFormat
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import HiddenStateSet, label_tables
from vllm_medusa.training.prompt_files import Prompt
from vllm_medusa.triton_kernels.reference_noise import gumbel_noise

FIRST_SEED = 1000
# Where the V2 runner's engine arguments for a CPU without Triton are.
ENGINES = Path(__file__).resolve().parent.parent / "tests" / "kernels"
# Numbers of noise that exist at once, int64 on the way: few enough for a processor's cache.
_NOISE_AT_ONCE = 2**20
# Of float32 logits from two programs a near tie may be drawn the other way.
LEAST_REDRAWN = 0.995

Pair = tuple[list[int], list[int]]


def sampled_answers(
    path: Path, questions: Sequence[Prompt], engine: dict[str, Any], sampling: dict[str, Any]
) -> TestAnswers:
    """Read ``path``, or let vLLM answer the first turns and write it.

    Question ``i`` has the seed ``FIRST_SEED + i``.
    """
    if not path.exists():
        order = (engine, [question.turns[0] for question in questions], sampling)
        # A process of its own gives all of its memory back.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pairs = pool.submit(_answer, *order).result()
        TestAnswers(ConversationSet.from_pairs(pairs), np.arange(len(pairs))).save(path)
    return TestAnswers.load(path)


def _answer(engine: dict[str, Any], turns: list[str], sampling: dict[str, Any]) -> list[Pair]:
    """(prompt ids, answer ids) of every question, by stock vLLM's V2 runner."""
    # vLLM reads these while it is imported.
    os.environ |= {"VLLM_PLUGINS": "", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        sys.path.insert(0, str(ENGINES))
        import cpu_engine

        engine = engine | cpu_engine.prepare_v2()
    from vllm import LLM, SamplingParams

    llm = LLM(**engine)
    chat = ChatFormat(llm.get_tokenizer())
    prompts = [chat.answer_prompt([{"role": "user", "content": turn}]) for turn in turns]
    params = [
        SamplingParams(**sampling, seed=FIRST_SEED + i, detokenize=False)
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return [
        (ids, list(output.outputs[0].token_ids))
        for ids, output in zip(prompts, outputs, strict=True)
    ]


@dataclass(frozen=True)
class DrawnRows:
    """What the noise of each row of a :class:`HiddenStateSet` depends on.

    Attributes
    ----------
    seeds : torch.Tensor, [rows] int64
    positions : torch.Tensor, [rows] int64
        At which the row's newest token was drawn, its own less one.
    temperature : float
    """

    seeds: torch.Tensor
    positions: torch.Tensor
    temperature: float

    @classmethod
    def of(cls, test: TestAnswers, temperature: float) -> DrawnRows:
        """Rows in the order in which hidden states are extracted."""
        parts = [rows for rows, _ in label_tables(test.answers, 0)]
        seeds = np.repeat(FIRST_SEED + test.questions, [len(rows) for rows in parts])
        positions = torch.from_numpy(np.concatenate(parts))
        return cls(torch.from_numpy(seeds), positions, temperature)

    def noise(self, rows: slice, spread: float) -> DrawNoise:
        """With what the tokens behind ``rows`` were drawn, each row a request of its own."""
        seeds, positions = self.seeds[rows], self.positions[rows]
        # The newest token is known, and so are those up to its row.
        lengths = (positions + 2).int()
        temperatures = torch.full(seeds.shape, self.temperature)
        slots = torch.arange(len(seeds))
        return DrawNoise(seeds, temperatures, lengths, slots, 1, 1, spread)


@torch.inference_mode()
def redrawn_share(
    data: HiddenStateSet,
    lm_head: torch.Tensor,  # [vocab, hidden]
    drawn: DrawnRows,
) -> float:
    """Share of the answers' tokens that are drawn again from the model's own logits."""
    ids, same = torch.arange(len(lm_head)), 0
    at_once = max(1, _NOISE_AT_ONCE // len(lm_head))
    for start in range(0, data.num_rows, at_once):
        rows = slice(start, start + at_once)
        logits = (data.hidden[rows] @ lm_head.T).float().cpu()
        noise = gumbel_noise(drawn.seeds[rows, None], drawn.positions[rows, None], ids)
        tokens = (logits / drawn.temperature + noise).argmax(-1)
        same += int((tokens == data.labels[rows, 0].cpu()).sum())
    return same / data.num_rows


def check_redrawn(share: float) -> None:
    """Refuse answers that were not drawn with the noise that drafts would use."""
    if share < LEAST_REDRAWN:
        raise ValueError(
            f"{share:.1%} of the answers' tokens are drawn again from the model's logits; expected "
            f"{LEAST_REDRAWN:.1%} or more. Answer with vLLM's V2 runner, without top-k or top-p, "
            "and in the dtype of the pass over the answers"
        )
