"""Statistics of served steps: tokens per step, by depth, group and prompt, with intervals."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_medusa.training.served_answers import ServedAnswer

# Two-sided share of bootstrap resamples inside an interval.
INTERVAL = 0.95


@dataclass(frozen=True)
class AnswerSteps:
    """Decode steps of one answer. The prompt's own first token takes no step and is left out."""

    prompt_index: int
    category: str
    # accepted draft tokens that became output, one entry a verification step
    accepted: tuple[int, ...]
    # steps that verified nothing, e.g. the first after a preemption
    plain_steps: int

    @classmethod
    def of(cls, answer: ServedAnswer) -> "AnswerSteps":
        """Count only what was output: the last step may accept tokens beyond the answer's end.

        >>> served = ServedAnswer(0, "all", (1,), (5, 6, 7, 8), accepted=(0, 3))
        >>> AnswerSteps.of(served).accepted
        (0, 1)
        """
        left = max(len(answer.token_ids) - 1, 0)
        accepted: list[int] = []
        for count in answer.accepted:
            # A step that was already under way when the answer ended yields no output.
            if left < 1:
                break
            accepted.append(min(count, left - 1))
            left -= accepted[-1] + 1
        return cls(answer.prompt_index, answer.category, tuple(accepted), left)

    @property
    def steps(self) -> int:
        return len(self.accepted) + self.plain_steps

    @property
    def tokens(self) -> int:
        return sum(self.accepted) + self.steps


def tokens_per_step(answers: Iterable[AnswerSteps]) -> float:
    """Output tokens over steps of all answers together; 0 without a step."""
    answers = list(answers)
    steps = sum(a.steps for a in answers)
    return sum(a.tokens for a in answers) / steps if steps else 0.0


def rate_by_depth(answers: Iterable[AnswerSteps], max_depth: int) -> list[float]:
    """Share of the steps whose accepted path reaches depth 1 .. ``max_depth``."""
    answers = list(answers)
    steps = max(sum(a.steps for a in answers), 1)
    counts = [n for a in answers for n in a.accepted]
    return [sum(n >= depth for n in counts) / steps for depth in range(1, max_depth + 1)]


def bootstrap_interval(
    # [prompts]
    tokens: Sequence[int],
    # [prompts]
    steps: Sequence[int],
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Percentile interval of ``sum(tokens) / sum(steps)`` when prompts are drawn anew.

    Prompts, not steps, are drawn: steps of one answer resemble each other, and counting them as
    independent would make the interval far too narrow.
    """
    ratio = sum(tokens) / sum(steps) if sum(steps) else 0.0
    if len(tokens) < 2 or not sum(steps):
        return ratio, ratio
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(tokens), (resamples, len(tokens)))
    ratios = np.asarray(tokens)[drawn].sum(1) / np.maximum(np.asarray(steps)[drawn].sum(1), 1)
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return float(low), float(high)


def summarise(
    answers: Sequence[AnswerSteps], max_depth: int, resamples: int, seed: int
) -> dict[str, Any]:
    """Tokens per step of a group with spread over prompts, interval and acceptance by depth."""
    by_prompt: dict[int, list[AnswerSteps]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt_index, []).append(answer)
    groups = [group for group in by_prompt.values() if any(a.steps for a in group)]
    tokens = [sum(a.tokens for a in group) for group in groups]
    steps = [sum(a.steps for a in group) for group in groups]
    ratios = [t / s for t, s in zip(tokens, steps, strict=True)]
    return {
        "prompts": len(by_prompt),
        "answers": len(answers),
        "steps": sum(steps),
        "tokens": sum(tokens),
        "tokens_per_step": tokens_per_step(answers),
        "interval": list(bootstrap_interval(tokens, steps, resamples, seed)),
        "spread_over_prompts": _spread(ratios),
        "accepted_by_depth": rate_by_depth(answers, max_depth),
        "steps_without_drafts": sum(a.plain_steps for a in answers),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "median": statistics.median(values), "min": min(values), "max": max(values),
        "mean": statistics.mean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
    }  # fmt: skip
