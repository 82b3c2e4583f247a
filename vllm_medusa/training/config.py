"""Settings of a training run and of a generation run; the only place of their defaults."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vllm_medusa.config import DYNAMIC_TREE

if TYPE_CHECKING:
    from vllm_medusa.head_weights import HeadSpec

# Name under which a training run keeps its TrainConfig in its output folder.
CONFIG_FILE = "train_config.json"

_C = TypeVar("_C", bound="_JsonConfig")


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError with name, value and expectation unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


class _JsonConfig:
    """Frozen dataclass that is written beside its result and read back from there."""

    def save(self, path: str | Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2)  # type: ignore[call-overload]
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[_C], path: str | Path) -> _C:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")), str(path))

    @classmethod
    def from_dict(cls: type[_C], values: dict[str, Any], where: str = "settings") -> _C:
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        require(not unknown, where, unknown, f"only the keys {sorted(known)}")
        return cls(**values)


@dataclass(frozen=True)
class HeadKind(_JsonConfig):
    """Number and kind of the heads to train."""

    num_heads: int = 4
    num_layers: int = 3
    # Output matrix: the base's; one of their own each; a common one; or a common one of low rank
    # behind a projection of their own (SlimSpec, arXiv 2605.10453).
    lm_head: Literal["shared", "own", "common", "low-rank"] = "shared"
    lm_head_rank: int = 256
    # Score only so many of the answers' most frequent tokens (FR-Spec, arXiv 2502.14856).
    vocab_subset: int | None = None
    # Head k also sees the tokens between the hidden state and its own (Hydra, arXiv 2402.05109).
    sequential: bool = False
    # Weight of head k is head_decay ** k, k from 1 (paper 2.2.1).
    head_decay: float = 0.8

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_layers", "lm_head_rank"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        choices = ("shared", "own", "common", "low-rank")
        require(self.lm_head in choices, "lm_head", self.lm_head, f"one of {choices}")
        subset = self.vocab_subset
        require(subset is None or subset >= 1, "vocab_subset", subset, "at least 1 or null")
        require(self.head_decay > 0, "head_decay", self.head_decay, "a positive number")

    @property
    def head_weights(self) -> tuple[float, ...]:
        """lambda_k, the loss weights of heads 1..num_heads."""
        return tuple(self.head_decay**k for k in range(1, self.num_heads + 1))

    def head_spec(self, hidden_size: int, vocab_size: int) -> "HeadSpec":
        """Heads of this kind for a base model; trained heads always have biases."""
        # Here, since the command line reads these classes and must not wait for torch.
        from vllm_medusa.head_weights import HeadSpec

        return HeadSpec(
            self.num_heads, self.num_layers, hidden_size, vocab_size, bias=True,
            own_lm_head=self.lm_head != "shared",
            common_lm_head=self.lm_head in ("common", "low-rank"),
            lm_head_rank=self.lm_head_rank if self.lm_head == "low-rank" else None,
            vocab_subset_size=self.vocab_subset, sequential=self.sequential,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(HeadKind):
    """Medusa-1 training: frozen base model, heads only.

    ``epochs`` fixes the length; with ``max_seconds`` the learning rate reaches its end at
    whichever comes first, so a run that is cut short still ends annealed.
    """

    epochs: float = 4.0
    batch_tokens: int = 16384
    # Best of 5e-4, 1e-3, 2e-3, 4e-3 after 300 steps at hidden size 576 (SmolLM2-135M, 3 layers:
    # cross entropy of head 1 3.34, 3.11, 2.82, 2.61). Wider models want less: the paper took
    # 2e-3 at 4096.
    learning_rate: float = 4e-3
    final_learning_rate_ratio: float = 0.0
    warmup_steps: int = 50
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    grad_clip: float = 1.0
    loss_chunk_rows: int = 8192
    checkpoint_every: int = 1000
    max_seconds: float | None = None
    # Hidden states of the answers: in the device's memory, or in files beside the result.
    hidden_states: Literal["memory", "disk"] = "memory"
    quantise: Literal["none", "8bit", "4bit"] = "none"
    # Pays from some million tokens on: compiling takes about half a minute.
    compile_base: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_tokens", "loss_chunk_rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("epochs", "learning_rate", "grad_clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("warmup_steps", "weight_decay", "checkpoint_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("beta1", "beta2", "final_learning_rate_ratio"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 <= x < 1")
        if self.max_seconds is not None:
            require(self.max_seconds > 0, "max_seconds", self.max_seconds, "positive or null")


@dataclass(frozen=True)
class DistillConfig(_JsonConfig):
    """Own answers of a chat model through vLLM.

    ``self_prompt_share`` of the first turns are written by the model itself in the user's role;
    the rest come from prompt files or, without files, from templates.
    """

    max_conversations: int = 50_000
    max_seconds: float | None = None
    self_prompt_share: float = 0.6
    user_temperature: float = 1.0
    # Each prompt is answered greedily once; this share is answered again by sampling.
    sampled_share: float = 0.3
    answer_temperature: float = 0.6
    second_turn_share: float = 0.35
    # Share of second turns that the model writes; the rest are stock follow-ups.
    self_follow_up_share: float = 0.5
    min_user_chars: int = 8
    max_user_tokens: int = 200
    max_answer_tokens: int = 448
    max_model_len: int = 2048
    max_num_seqs: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_conversations", "max_user_tokens", "max_answer_tokens", "max_num_seqs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "self_prompt_share", "sampled_share", "second_turn_share", "self_follow_up_share",
        ):  # fmt: skip
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        for name in ("user_temperature", "answer_temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        needed = self.max_user_tokens + self.max_answer_tokens
        require(
            self.max_model_len > needed, "max_model_len", self.max_model_len,
            f"more than one turn and its answer, {needed} tokens",
        )  # fmt: skip
        if self.max_seconds is not None:
            require(self.max_seconds > 0, "max_seconds", self.max_seconds, "positive or null")


@dataclass(frozen=True)
class EvalConfig(_JsonConfig):
    """Acceptance of served heads on a prompt set."""

    max_tokens: int = 256
    temperature: float = 0.0
    # Only the first prompts, the same number of every category as far as it goes.
    limit: int | None = None
    # Tree and node budget; the server's own defaults without them.
    tree: str | None = None
    nodes: int | None = None
    dtype: str = "auto"
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "resamples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("limit", "nodes"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1 or null")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(
            self.tree != DYNAMIC_TREE, "tree", self.tree,
            "one tree for all steps, with which the served steps are compared",
        )  # fmt: skip
