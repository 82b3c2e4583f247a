"""The head variants that are compared, in order of worth."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

# Steps of the short runs that are compared with each other, and about how long they take.
CURVE_STEPS = 800
CURVE_SECONDS = 22
OWN_BASE = "base"


@dataclass(frozen=True)
class Variant:
    """One kind of heads and how it is trained."""

    name: str
    # wall-clock length of the training; the learning rate reaches its end there
    seconds: float
    # fields of TrainConfig, or of JointConfig where ``joint``
    settings: dict[str, Any] = field(default_factory=dict)
    # Medusa-2: changes a copy of the base, which later variants may name as their base
    joint: bool = False
    # variant whose heads these start from
    start: str | None = None
    # base whose hidden states the heads read: the model itself or a joint variant
    base: str = OWN_BASE
    # share of the conversations that are trained on
    share: float = 1.0
    # fixed length instead of ``seconds``, for runs that are compared at equal steps
    steps: int | None = None


PLAIN = {"num_heads": 5, "num_layers": 3}
SEQUENTIAL = {"num_heads": 4, "num_layers": 3, "sequential": True}
JOINT = {
    "head_only_epochs": 0.0, "lora_rank": 64, "lora_dropout": 0.0, "batch_size": 32,
    "warmup_steps": 40,
    # One forward pass a step: many small ones would wait for their launches. Longer conversations
    # would make all others of their step as long.
    "micro_batch_size": 32, "max_length": 512,
}  # fmt: skip


def _curve(name: str, share: float = 1.0, **settings: Any) -> Variant:
    """A short run; those of one ``sequential`` differ in data or in size alone."""
    kind = {"num_heads": 4, "num_layers": 3, **settings}
    return Variant(name, CURVE_SECONDS, kind, share=share, steps=CURVE_STEPS)


VARIANTS = (
    Variant("medusa-1", 40, {"num_heads": 5, "num_layers": 1}),
    Variant("plain-3-blocks", 75, PLAIN),
    Variant("sequential", 75, SEQUENTIAL),
    Variant("medusa-2", 100, {**PLAIN, **JOINT}, joint=True, start="plain-3-blocks"),
    Variant("medusa-2-sequential", 60, {**SEQUENTIAL, "learning_rate": 2e-3},
            start="sequential", base="medusa-2"),
    Variant("medusa-2-heads-again", 20, {**PLAIN, "learning_rate": 2e-3},
            start="medusa-2", base="medusa-2"),
    Variant("sequential-long", 100, {**SEQUENTIAL, "num_heads": 5, "num_layers": 4}),
    _curve("sequential-data-1-of-16", 1 / 16, sequential=True),
    _curve("sequential-data-1-of-4", 1 / 4, sequential=True),
    _curve("sequential-data-all", sequential=True),
    _curve("data-1-of-16", 1 / 16),
    _curve("data-1-of-4", 1 / 4),
    _curve("data-all"),
    _curve("sequential-1-block", sequential=True, num_layers=1),
    _curve("1-block", num_layers=1),
    _curve("sequential-5-blocks", sequential=True, num_layers=5),
    _curve("5-blocks", num_layers=5),
    # Scoring the frequent tokens only makes a step about twice as fast.
    Variant("sequential-16k-words", 60, {**SEQUENTIAL, "vocab_subset": 16384}),
    Variant("sequential-common-lm-head", 60, {**SEQUENTIAL, "lm_head": "common"}),
)  # fmt: skip

# Without --only; the others are for further runs.
DEFAULT = tuple(v.name for v in VARIANTS[:17])


def choose(
    names: list[str], overrides: list[str], scale: float, trained: tuple[str, ...] = ()
) -> list[Variant]:
    """Variants of those names in the plan's order, with their lengths changed.

    Parameters
    ----------
    names : list of str
        All of ``DEFAULT`` if empty.
    overrides : list of str
        ``NAME=SECONDS``; for runs of fixed length their steps shrink or grow alike.
    scale : float
        Factor of the lengths that are not overridden.
    trained : tuple of str
        Variants that are trained already and left out.
    """
    known = {variant.name: variant for variant in VARIANTS}
    seconds = {}
    for item in overrides:
        name, _, value = item.partition("=")
        seconds[name] = float(value)
    unknown = sorted({*names, *seconds} - set(known))
    if unknown:
        raise ValueError(f"unknown variants {unknown}; expected some of {sorted(known)}")
    wanted = set(names or DEFAULT) - set(trained)
    return [
        _lengthened(v, seconds.get(v.name, v.seconds * scale))
        for v in VARIANTS
        if v.name in wanted
    ]


def _lengthened(variant: Variant, seconds: float) -> Variant:
    steps = variant.steps
    if steps is not None:
        steps = max(1, round(steps * seconds / variant.seconds))
    return dataclasses.replace(variant, seconds=seconds, steps=steps)
