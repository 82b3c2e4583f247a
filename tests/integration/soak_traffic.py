"""Requests of the soak: request ``index`` is the same in every run."""

from __future__ import annotations

import random
from typing import Any

from tiny import VOCAB

SHARED_PREFIXES, PREFIX_TOKENS = 8, 64
LONG_PROMPT = 210  # more than one step takes
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["small", "smart", "large"]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
CHOICES = ["yes, always", "yes, at times", "no", "never"]

# kind -> (weight, sampling parameters on top of greedy or seeded sampling)
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "free": (30, {}),
    "repetition": (8, {"repetition_penalty": 1.1}),
    "presence": (8, {"presence_penalty": 0.8, "frequency_penalty": 0.3}),
    "bad words": (4, {"bad_words": ["A", "BC", "DEF"]}),
    "bias": (4, {"logit_bias": {17: 4.0, 40: -100.0}, "min_tokens": 4}),
    "JSON schema": (5, {"structured_outputs": {"json": SCHEMA}, "max_tokens": 40}),
    "choice": (8, {"structured_outputs": {"choice": CHOICES}}),
    "logprobs": (8, {"logprobs": 2}),
    "prompt logprobs": (3, {"prompt_logprobs": 1}),
    "no tree": (4, {"extra_args": {"medusa_nodes": 0}}),
    "small tree": (8, {"extra_args": {"medusa_nodes": 3}}),
    "typical": (
        8,
        {"extra_args": {"medusa_acceptance": "typical", "medusa_typical_epsilon": 0.3}},
    ),
    "two at once": (2, {"n": 2}),
}
ABORTED_SHARE = 0.12


def prompt(rng: random.Random) -> list[int]:
    """Mostly a few tokens; some share a prefix, some are longer than a step."""
    length, draw = rng.randint(1, 40), rng.random()
    if draw < 0.05:
        length = rng.randint(LONG_PROMPT - 10, LONG_PROMPT)
    ids = [rng.randrange(3, VOCAB) for _ in range(length)]
    if 0.05 <= draw < 0.35:
        shared = random.Random(f"prefix {rng.randrange(SHARED_PREFIXES)}")
        ids = [shared.randrange(3, VOCAB) for _ in range(PREFIX_TOKENS)] + ids
    return ids


def request(index: int) -> dict[str, Any]:
    """Request ``index``.

    Returns
    -------
    dict
        ``prompt`` token ids; ``kind``; ``sampling`` as :mod:`engine_job` reads it; ``abort``:
        None, or the number of output tokens after which its client leaves (0: a moment after
        it asked).
    """
    rng = random.Random(f"request {index}")
    (kind,) = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])
    sampling: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "temperature": 0.0}
    sampling["ignore_eos"] = rng.random() < 0.7 and "structured_outputs" not in KINDS[kind][1]
    # vLLM refuses several greedy completions.
    if rng.random() < 0.5 or kind == "two at once":
        sampling |= {"temperature": rng.choice([0.3, 0.7, 1.0]), "seed": index}
        sampling |= rng.choice([{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}])
    sampling |= KINDS[kind][1]
    sampling["max_tokens"] = max(sampling["max_tokens"], sampling.get("min_tokens", 0))
    abort = None
    if rng.random() < ABORTED_SHARE:
        abort = rng.randint(0, sampling["max_tokens"] - 1)
    return {"prompt": prompt(rng), "kind": kind, "sampling": sampling, "abort": abort}


def is_comparable(asked: dict[str, Any]) -> bool:
    """Whether plain vLLM has to give the same tokens: not where another rule is asked for."""
    return asked["kind"] != "typical" or asked["sampling"]["temperature"] == 0.0


def plain_sampling(sampling: dict[str, Any]) -> dict[str, Any]:
    """The same for an engine without Medusa."""
    return {key: value for key, value in sampling.items() if key not in ("extra_args", "n")}
