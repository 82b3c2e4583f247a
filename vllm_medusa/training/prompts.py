"""Sources of user turns: templates, and a guard against test questions."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from vllm_medusa.training.prompt_data import FOLLOW_UPS, PATTERN_GROUPS, SLOTS

_SLOT = re.compile(r"\{([a-z_]+?)(\d?)\}")
# Number slots a..d: ranges that keep the arithmetic within a small model's reach.
_NUMBER_RANGES = {"a": (20, 999), "b": (2, 99), "c": (2, 12), "d": (2, 9)}


def _fill(pattern: str, rng: random.Random) -> str:
    """Fill each slot; a repeated slot repeats its word, ``{topic2}`` draws a different one."""
    drawn: dict[str, str] = {}

    def draw(match: re.Match[str]) -> str:
        key, kind = match.group(0), match.group(1)
        if key not in drawn:
            if kind in _NUMBER_RANGES:
                drawn[key] = str(rng.randint(*_NUMBER_RANGES[kind]))
            else:
                taken = set(drawn.values())
                drawn[key] = rng.choice([word for word in SLOTS[kind] if word not in taken])
        return drawn[key]

    text = _SLOT.sub(draw, pattern)
    return text[0].upper() + text[1:]


def template_prompts(seed: int) -> Iterator[str]:
    """Endless first turns from patterns over topics, roles, code tasks, numbers and texts.

    Parameters
    ----------
    seed : int
        The same seed gives the same prompts in the same order.

    Examples
    --------
    >>> next(template_prompts(0)) == next(template_prompts(0))
    True
    """
    rng = random.Random(seed)
    shares = [share for share, _ in PATTERN_GROUPS]
    while True:
        ((_, patterns),) = rng.choices(PATTERN_GROUPS, weights=shares)
        yield _fill(rng.choice(patterns), rng)


def follow_up(rng: random.Random) -> str:
    """Draw a user's second turn that makes sense after any answer."""
    return _fill(rng.choice(FOLLOW_UPS), rng)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class TestQuestionGuard:
    """Recognises prompts that share a run of words with questions kept for testing.

    Parameters
    ----------
    questions : iterable of str
        Texts that no training prompt may repeat.
    run_length : int
        Words in a row that count as a copy. Shorter questions are compared whole.
    """

    __test__ = False  # the name starts with "Test"; it is no pytest class

    def __init__(self, questions: Iterable[str], run_length: int = 8) -> None:
        if run_length < 1:
            raise ValueError(f"run_length is {run_length}; expected at least 1")
        self.run_length = run_length
        self._runs: set[tuple[str, ...]] = set()
        self._short: set[tuple[str, ...]] = set()
        for question in questions:
            words = _words(question)
            if len(words) < run_length:
                self._short.add(tuple(words))
            self._runs.update(self._runs_of(words))

    def _runs_of(self, words: Sequence[str]) -> Iterator[tuple[str, ...]]:
        for start in range(len(words) - self.run_length + 1):
            yield tuple(words[start : start + self.run_length])

    def is_copy(self, prompt: str) -> bool:
        """Whether ``prompt`` repeats a question or a run of ``run_length`` of its words."""
        words = _words(prompt)
        return tuple(words) in self._short or any(r in self._runs for r in self._runs_of(words))
