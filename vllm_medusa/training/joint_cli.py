"""Subcommand train-joint: Medusa-2, or Medusa-1 with hidden states computed on line."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from vllm_medusa.training.cli import (
    HELD_OUT_FILE,
    add_training_arguments,
    calibrate_heads,
    read_answers,
)
from vllm_medusa.training.config_options import run_config
from vllm_medusa.training.joint_config import JointConfig


def add_train_joint_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa train-joint --model M --data FILES --output DIR``."""
    parser = subparsers.add_parser(
        "train-joint",
        help="train heads and base model together (Medusa-2)",
        description=(
            "Heads alone, then heads with the base's LoRA adapter or all its weights. On several "
            "GPUs: accelerate launch -m vllm_medusa.cli train-joint ..."
        ),
    )
    add_training_arguments(parser, JointConfig)
    parser.add_argument("--heads", type=Path, help="start from these heads, e.g. Medusa-1's")
    parser.set_defaults(run=run_train_joint)


def run_train_joint(arguments: argparse.Namespace) -> None:
    """Train, export and calibrate."""
    from vllm_medusa.training.joint_trainer import JointTrainer
    from vllm_medusa.training.sequence_batches import SequenceData

    config = run_config(JointConfig, arguments)
    loaded = read_answers(arguments.data, arguments.model)
    answers, held_out = loaded.split(arguments.held_out, config.seed)
    data = SequenceData(answers, config.num_heads, config.max_length)
    model = _joint_model(arguments, config, answers)
    trainer = JointTrainer(config, model, data, arguments.output, cpu=arguments.device == "cpu")
    if arguments.resume:
        trainer.load_state()
    trained = trainer.train()
    if trainer.accelerator.distributed_type.name == "FSDP":
        _gather_weights(trainer)
    if trainer.accelerator.is_main_process:
        _finish(arguments, trained, trainer, data, held_out)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _joint_model(arguments: argparse.Namespace, config: JointConfig, answers: Any) -> Any:
    from vllm_medusa.checkpoint import load_heads
    from vllm_medusa.training.base_model import lm_head_weight, load_base
    from vllm_medusa.training.joint_model import JointModel
    from vllm_medusa.training.new_heads import new_heads
    from vllm_medusa.training.trainable_heads import TrainableHeads

    # A quantised model lies where it was quantised; accelerate moves the others.
    device = None if config.quantise != "none" else "cpu"
    base = load_base(arguments.model, config.dtype, device, config.quantise)
    weight = lm_head_weight(base)
    heads = new_heads(config, weight, answers, base.device)
    if arguments.heads is not None:
        loaded = load_heads(
            arguments.heads, vocab_size=weight.shape[0], hidden_size=weight.shape[1]
        )
        start = TrainableHeads.from_weights(loaded, base.device)
        wanted = {name: tensor.shape for name, tensor in heads.state_dict().items()}
        found = {name: tensor.shape for name, tensor in start.state_dict().items()}
        if found != wanted:
            raise ValueError(
                f"{arguments.heads} holds {loaded.spec}; expected heads as the settings describe "
                f"them: {heads.spec}"
            )
        heads = start
    return JointModel(base, heads, config)


def _gather_weights(trainer: Any) -> None:
    """Put the whole weights back into the unwrapped model of the main process."""
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        trainer.joint_model.load_state_dict(weights)


def _finish(
    arguments: argparse.Namespace, trained: Any, trainer: Any, data: Any, held_out: Any
) -> None:
    from vllm_medusa.provenance import collect_provenance
    from vllm_medusa.training.joint_export import export_joint

    name = Path(arguments.model).name
    base = export_joint(trained, arguments.output, name, arguments.model)
    held_out.save(arguments.output / HELD_OUT_FILE)
    record = collect_provenance(
        config=dataclasses.asdict(trainer.config), steps=trainer.step,
        conversations=len(data), skipped=dict(data.counts),
        processes=trainer.accelerator.num_processes, log=trainer.log.rows(),
    )  # fmt: skip
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    calibrate_heads(base, trained.heads, held_out, arguments.output, arguments)
