"""Trains one variant through the library's own trainers."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from variant_bases import Base, cut_share
from variant_plan import Variant

from vllm_medusa.training.base_model import load_base
from vllm_medusa.training.config import CONFIG_FILE, TrainConfig
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.export import export_heads
from vllm_medusa.training.hidden_states import HiddenStateSet
from vllm_medusa.training.joint_config import JointConfig
from vllm_medusa.training.joint_export import export_joint
from vllm_medusa.training.joint_model import JointModel
from vllm_medusa.training.joint_trainer import JointTrainer
from vllm_medusa.training.loss import IGNORE, medusa_one_loss
from vllm_medusa.training.new_heads import new_heads
from vllm_medusa.training.path_tokens import path_embeddings
from vllm_medusa.training.sequence_batches import SequenceData
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.training.trainer import MedusaOneTrainer, short_run

# Steps that tell how long a step of joint training takes, behind as many that warm up.
TIMED_STEPS = 5


def started_from(heads: TrainableHeads, start: TrainableHeads | None) -> TrainableHeads:
    """New heads with the weights of trained ones of the same kind."""
    if start is not None:
        heads.load_state_dict(start.state_dict())
    return heads


def train_heads(
    variant: Variant, base: Base, start: TrainableHeads | None, directory: Path,
    settings: dict[str, Any],
) -> tuple[TrainableHeads, dict[str, Any]]:  # fmt: skip
    """Medusa-1 on the base's hidden states; -> heads and what the run was like."""
    data = cut_share(base.hidden("train"), variant.share)
    config = TrainConfig(**{"epochs": 1e6, **settings, **variant.settings})
    if variant.steps is not None:
        config = short_run(config, variant.steps, data.num_rows)
    else:
        config = dataclasses.replace(config, max_seconds=variant.seconds)
    answers = base.train
    heads = started_from(new_heads(config, base.lm_head, answers, base.model.device), start)
    embeddings = base.embeddings if config.sequential else None
    trainer = MedusaOneTrainer(config, data, base.lm_head, heads=heads, embeddings=embeddings)
    trainer.train()
    synchronise(base.model.device)
    directory.mkdir(parents=True, exist_ok=True)
    config.save(directory / CONFIG_FILE)
    export_heads(heads, directory, base.lm_head.shape[0], base.name)
    tokens = trainer.step * config.batch_tokens
    return heads, {
        "config": dataclasses.asdict(config), "steps": trainer.step,
        "seconds": round(trainer.seconds, 2), "training_rows": data.num_rows,
        "tokens": tokens, "tokens_per_second": round(tokens / max(trainer.seconds, 1e-9)),
        "epochs_seen": round(tokens / data.num_rows, 3),
        "history": trainer.history[:: max(1, len(trainer.history) // 20)] + trainer.history[-1:],
    }  # fmt: skip


def train_joint(
    variant: Variant, model_path: str, device: str, answers: ConversationSet,
    start: TrainableHeads | None, directory: Path, settings: dict[str, Any],
) -> tuple[TrainableHeads, Any, dict[str, Any]]:  # fmt: skip
    """Medusa-2 on a copy of the base; -> heads, the changed base, what the run was like."""
    config = JointConfig(**{**variant.settings, **settings})
    data = SequenceData(answers, config.num_heads, config.max_length)
    # As many epochs as the time will do; the schedules need the number of steps.
    config = dataclasses.replace(config, joint_epochs=1e3, checkpoint_every=0)
    base = load_base(model_path, config.dtype, device)
    weight = base.get_output_embeddings().weight.detach()
    heads = started_from(new_heads(config, weight, answers, base.device), start)
    trainer = JointTrainer(
        config, JointModel(base, heads, config), data, directory, cpu=device == "cpu"
    )
    trained = _run_for(trainer, variant.seconds, base.device)
    steps, seconds = trainer.step, trained["seconds"]
    rows = trainer.log.rows()
    model = trainer.joint_model
    changed = export_joint(model, directory, "base", model_path)
    tokens = steps * config.batch_size * answers.num_answer_tokens / max(len(answers), 1)
    return model.heads, changed, {
        "config": dataclasses.asdict(config), "steps": steps, **trained,
        "training_rows": answers.num_answer_tokens, "tokens": round(tokens),
        "tokens_per_second": round(tokens / max(seconds, 1e-9)),
        "history": rows[:: max(1, len(rows) // 20)] + rows[-1:],
    }  # fmt: skip


def _run_for(trainer: JointTrainer, seconds: float, device: torch.device) -> dict[str, float]:
    """Train for about ``seconds``: a few steps are timed, then the total is set."""
    # Neither states nor plots are wanted, and they would count as steps' time.
    trainer.save_state = trainer.log.plot = lambda: None
    started = time.monotonic()
    wanted = trainer.total_steps
    trainer.train(until_step=TIMED_STEPS)
    synchronise(device)
    timed = time.monotonic()
    trainer.train(until_step=2 * TIMED_STEPS)
    synchronise(device)
    now = time.monotonic()
    each = (now - timed) / TIMED_STEPS
    left = int(max(1, (seconds - (now - started)) / each))
    trainer.total_steps = min(wanted, trainer.step + left)
    trainer.train()
    synchronise(device)
    return {"seconds": round(time.monotonic() - started, 2), "first_step_seconds": round(each, 4)}


def synchronise(device: torch.device | str) -> None:
    """Wait for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def held_out_losses(
    heads: TrainableHeads, data: HiddenStateSet, base: Base, batch_rows: int = 8192
) -> list[float]:
    """Mean cross entropy of every head on held-out rows, in nats."""
    count = heads.num_heads
    totals = torch.zeros(count, device=data.hidden.device)
    labels_seen = torch.zeros(count, device=data.hidden.device)
    for start in range(0, data.num_rows, batch_rows):
        rows = slice(start, start + batch_rows)
        labels, hidden = data.labels[rows].long(), data.hidden[rows]
        path = None
        if heads.spec.sequential:
            path = path_embeddings(labels, count, base.embeddings).to(hidden.dtype)
        inputs = heads.loss_inputs(hidden, labels[:, 1 : count + 1], base.lm_head, path)
        _, means = medusa_one_loss(*inputs, head_weights=[1.0] * count)
        seen = (inputs.labels != IGNORE).sum(0)
        totals += means * seen
        labels_seen += seen
    return [round(x, 4) for x in (totals / labels_seen.clamp(min=1)).tolist()]
