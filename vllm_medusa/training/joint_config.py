"""Settings of joint training, and what they say about each step."""

import math
from dataclasses import dataclass
from typing import Literal

from vllm_medusa.training.config import HeadKind, require

# All linear layers of a decoder block but not the lm_head, which the heads may share.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class JointConfig(HeadKind):
    """Medusa-2: heads alone for a while, then heads and backbone together (paper 2.2.2).

    With ``joint_epochs`` 0 it is Medusa-1 with hidden states computed on line, on a base that
    may be quantised.
    """

    num_heads: int = 5
    num_layers: int = 1
    head_only_epochs: float = 1.0
    joint_epochs: float = 2.0
    # Conversations a step over all processes, and a forward pass of one process.
    batch_size: int = 64
    micro_batch_size: int = 2
    max_length: int = 2048
    # Of the backbone; the heads' is head_lr_multiplier times as large (appendix B).
    learning_rate: float = 5e-4
    head_lr_multiplier: float = 4.0
    warmup_steps: int = 40
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0
    # lambda_0, the weight of the heads' loss, and how the joint stage reaches it.
    medusa_weight: float = 0.2
    medusa_schedule: Literal["constant", "linear", "sine"] = "constant"
    # 0 trains the whole backbone.
    lora_rank: int = 32
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = LORA_TARGETS
    # KL to the model without its adapter in place of the cross entropy (paper 2.3.2).
    self_distillation: bool = True
    quantise: Literal["none", "8bit", "4bit"] = "none"
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    # Of a base that is only read; compiling takes 10 s (7B on an H100) for batches of one shape and
    # as long again where another comes.
    compile_base: bool = False
    loss_chunk_rows: int = 2048
    log_every: int = 10
    checkpoint_every: int = 500
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        # JSON has lists only.
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name in ("batch_size", "micro_batch_size", "max_length", "loss_chunk_rows",
                     "log_every"):  # fmt: skip
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "head_lr_multiplier", "grad_clip", "medusa_weight"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("head_only_epochs", "joint_epochs", "warmup_steps", "weight_decay",
                     "lora_rank", "checkpoint_every"):  # fmt: skip
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("beta1", "beta2", "lora_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 <= x < 1")
        schedules = ("constant", "linear", "sine")
        require(self.medusa_schedule in schedules, "medusa_schedule", self.medusa_schedule,
                f"one of {schedules}")  # fmt: skip
        require(self.head_only_epochs + self.joint_epochs > 0, "epochs", 0, "a positive number")
        self._check_backbone()

    def _check_backbone(self) -> None:
        if self.joint_epochs == 0:
            return
        require(not self.compile_base, "compile_base", True, "false with a joint stage")
        whole = self.lora_rank == 0
        require(
            not (whole and self.self_distillation), "self_distillation", True,
            "false with lora_rank 0: the teacher is the model without its adapter, and there is "
            "none",
        )  # fmt: skip
        require(not (whole and self.quantise != "none"), "quantise", self.quantise,
                "none with lora_rank 0: quantised weights cannot be trained")  # fmt: skip
        require(
            "lm_head" not in self.lora_targets or self.lm_head != "shared", "lora_targets",
            self.lora_targets, "no lm_head while the heads share it; use lm_head own",
        )  # fmt: skip

    def rate_factor(self, step: int, steps: int) -> float:
        """Share of the learning rate at a step of a stage: linear warm-up, then cosine to 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))

    def medusa_factor(self, step: int, steps: int) -> float:
        """lambda_0 at a step of the joint stage.

        >>> JointConfig(medusa_schedule="sine", medusa_weight=0.5).medusa_factor(50, 100)
        0.35355339059327373
        """
        done = step / max(steps, 1)
        shares = {"constant": 1.0, "linear": done, "sine": math.sin(done * math.pi / 2)}
        return self.medusa_weight * shares[self.medusa_schedule]
