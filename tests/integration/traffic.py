"""Deterministic request mixes for the engine tests."""

from __future__ import annotations

import random

from tiny import VOCAB


def prompts(count: int, seed: int, low: int = 3, high: int = 96) -> list[list[int]]:
    """Token ids of mixed lengths; every fourth prompt repeats a prefix of an earlier one."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    for index in range(count):
        length = rng.randint(low, high)
        ids = [rng.randrange(3, VOCAB) for _ in range(length)]
        if index % 4 == 3:
            shared = made[rng.randrange(len(made))]
            ids = (shared + ids)[:high]
        made.append(ids)
    return made


def sampling(kind: str, count: int, max_tokens: int = 128) -> list[dict]:
    """Sampling parameters of ``count`` requests.

    ``greedy``; ``seeded`` (temperature, top-k, top-p, min-p and a seed, all varied);
    ``mixed`` (greedy, seeded and stop conditions side by side).
    """
    rng = random.Random(kind)
    made = []
    for index in range(count):
        params: dict = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0}
        if kind == "seeded" or (kind == "mixed" and index % 2):
            params |= {"temperature": rng.choice([0.3, 0.7, 1.0]), "seed": 1000 + index}
            if index % 3 == 0:
                params["top_p"] = 0.9
            if index % 5 == 0:
                params["top_k"] = 20
            if index % 7 == 0:
                params["min_p"] = 0.05
        if kind == "mixed":
            params["max_tokens"] = rng.randint(1, max_tokens)
            params["ignore_eos"] = index % 3 != 0
            if index % 4 == 0:
                params["stop_token_ids"] = [rng.randrange(3, VOCAB) for _ in range(8)]
        made.append(params)
    return made
