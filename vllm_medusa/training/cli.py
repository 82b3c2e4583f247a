"""Subcommands of training: distill, train, calibrate, restrict."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_medusa.training.config import DistillConfig, TrainConfig
from vllm_medusa.training.config_options import (
    add_config_options,
    add_engine_args,
    config_from_options,
    run_config,
)

if TYPE_CHECKING:
    from vllm_medusa.training.conversations import ConversationSet

HELD_OUT_FILE = "held_out.safetensors"


def add_distill_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa distill --model M --output FILE``."""
    parser = subparsers.add_parser(
        "distill",
        help="let a chat model write its own training answers",
        description=(
            "Generate conversations with vLLM: first turns written by the model itself, from "
            "files or from templates, answered by the model. Writes token ids and answer mask."
        ),
    )
    parser.add_argument("--model", required=True, help="chat model, folder or hub id")
    parser.add_argument(
        "--output", required=True, type=Path, help=".safetensors, .jsonl or .parquet to write"
    )
    parser.add_argument(
        "--prompts", nargs="*", default=[], help="prompt files: .txt, .jsonl, .json, .parquet"
    )
    parser.add_argument(
        "--exclude", nargs="*", default=[],
        help="test questions (.txt or .jsonl): prompts that repeat 8 words of them are dropped",
    )  # fmt: skip
    add_engine_args(parser)
    add_config_options(parser, DistillConfig)
    parser.set_defaults(run=run_distill)


def add_train_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa train --model M --data FILES --output DIR``."""
    parser = subparsers.add_parser(
        "train",
        help="train Medusa heads for a frozen base model",
        description=(
            "Medusa-1: run the base model once over the answers, train heads on its hidden "
            "states, write them with a calibrated tree."
        ),
    )
    add_training_arguments(parser, TrainConfig)
    parser.add_argument("--base-model-name", help="name recorded in config.json; default: --model")
    parser.set_defaults(run=run_train)


def add_calibrate_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa calibrate --model M --heads DIR``."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure heads on answers and search their best tree",
        description="Rank the right tokens under every head and write tree.json beside them.",
    )
    parser.add_argument("--model", required=True, help="base model, folder or hub id")
    parser.add_argument("--heads", required=True, type=Path, help="checkpoint folder")
    parser.add_argument(
        "--data", nargs="*", default=[], help=f"answers; default: {HELD_OUT_FILE} of the folder"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the base, default bfloat16")
    parser.add_argument(
        "--prompts", nargs="*", default=[],
        help="answer these held-out prompts with vLLM, in the model's chat template, instead",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer, default 256")
    add_engine_args(parser)
    add_tree_arguments(parser)
    parser.set_defaults(run=run_calibrate)


def add_restrict_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa restrict --heads DIR --data FILES --count N --output DIR``."""
    parser = subparsers.add_parser(
        "restrict",
        help="let heads score only the most frequent tokens",
        description="Cut heads to the most frequent tokens of answers (FR-Spec); no training.",
    )
    parser.add_argument("--heads", required=True, type=Path, help="checkpoint to read")
    parser.add_argument("--data", required=True, nargs="+", help="answers to count tokens in")
    parser.add_argument("--count", required=True, type=int, help="tokens to keep")
    parser.add_argument("--output", required=True, type=Path, help="checkpoint folder to write")
    parser.add_argument("--vocab-size", type=int, help="of the base, if the heads do not tell")
    parser.set_defaults(run=run_restrict)


def add_training_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """What both trainers take: model, answers, output folder, tree, and the settings' fields."""
    parser.add_argument("--model", required=True, help="base model, folder or hub id")
    parser.add_argument("--data", required=True, nargs="+", help="answers of distill, or chats")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--held-out", type=int, default=2500, help="answers kept for calibration")
    parser.add_argument("--resume", action="store_true", help="continue with the folder's settings")
    add_tree_arguments(parser)
    add_config_options(parser, config)


def add_tree_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-nodes", type=int, default=63, help="tree nodes, default 63")
    parser.add_argument("--max-rank", type=int, default=16, help="ranks looked at, default 16")
    parser.add_argument("--device", default=None, help="default: cuda if there is one")


def run_distill(arguments: argparse.Namespace) -> None:
    """Generate and write one conversation file and its settings."""
    from transformers import AutoTokenizer
    from vllm import LLM

    from vllm_medusa.training.answer_files import check_output, write_answers
    from vllm_medusa.training.chat_format import ChatFormat
    from vllm_medusa.training.generate import Distiller
    from vllm_medusa.training.journal import Journal
    from vllm_medusa.training.prompts import TestQuestionGuard, template_prompts

    config = config_from_options(DistillConfig, arguments)
    output = check_output(arguments.output)
    given = _given_turns(arguments.prompts)
    tests = [turn for turns in _given_turns(arguments.exclude) for turn in turns]

    def prompts() -> Iterator[list[str]]:
        if given:
            yield from given
        else:
            yield from ([text] for text in template_prompts(config.seed))

    settings = dataclasses.asdict(config) | {"model": arguments.model}
    for name in ("max_conversations", "max_seconds", "max_num_seqs"):
        del settings[name]  # a resumed run may ask for more
    journal = Journal(output.with_name(f"{output.name}.journal"), settings)
    if journal.answers:
        print(f"resuming with {len(journal.answers)} answers of {journal.path}")
    llm = LLM(
        model=arguments.model, max_model_len=config.max_model_len, seed=config.seed,
        max_num_seqs=config.max_num_seqs, **arguments.engine_args,
    )  # fmt: skip
    chat = ChatFormat(AutoTokenizer.from_pretrained(arguments.model))
    distiller = Distiller(llm.llm_engine, chat, config, TestQuestionGuard(tests), journal)
    answers = distiller.run(prompts())
    counts = {"counts": json.dumps(distiller.counts)}
    write_answers(output, distiller.answers[: config.max_conversations], counts)
    config.save(output.with_suffix(".json"))
    journal.close(remove=True)
    print(f"{output}: {len(answers)} answers, {answers.num_answer_tokens} answer tokens")


def _given_turns(paths: Sequence[str]) -> list[list[str]]:
    """User turns of prompt files; says what was left out."""
    from vllm_medusa.training.prompt_files import read_prompts

    found: list[list[str]] = []
    for path in paths:
        file = read_prompts(path)
        found += file.turns
        for reason, count in file.skipped.items():
            print(f"{path}: {count} rows left out ({reason})")
    return found


def read_answers(paths: Sequence[str | Path], model: str) -> "ConversationSet":
    """Answer files for training; chats are rendered with the model's template."""
    from vllm_medusa.training.answer_files import load_answers

    tokenizer = None
    if any(Path(path).suffix != ".safetensors" for path in paths):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
    answers, skipped = load_answers(paths, tokenizer)
    positions = _positions_of(model)
    if positions is not None:
        answers, longer = answers.up_to(positions)
        skipped[f"longer than the model's {positions} positions"] += longer
    for reason, count in skipped.items():
        if count:
            print(f"{count} conversations left out ({reason})")
    return answers


def _positions_of(model: str) -> int | None:
    """Positions that a model was made for, where its configuration tells."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)


def run_train(arguments: argparse.Namespace) -> None:
    """Extract hidden states, train, export, calibrate."""
    from vllm_medusa.provenance import collect_provenance
    from vllm_medusa.training.base_model import (
        compile_layers,
        embedding_weight,
        lm_head_weight,
        load_base,
    )
    from vllm_medusa.training.export import export_heads
    from vllm_medusa.training.hidden_shards import hidden_states_of
    from vllm_medusa.training.new_heads import new_heads
    from vllm_medusa.training.trainer import MedusaOneTrainer

    config = run_config(TrainConfig, arguments)
    loaded = read_answers(arguments.data, arguments.model)
    answers, held_out = loaded.split(arguments.held_out, config.seed)
    model = load_base(arguments.model, device=arguments.device, quantise=config.quantise)
    if config.compile_base:
        compile_layers(model)
    lm_head = lm_head_weight(model)
    data = hidden_states_of(model, answers, config, arguments.output, arguments.model)
    heads = new_heads(config, lm_head, answers, model.device)
    embeddings = embedding_weight(model) if config.sequential else None
    make = MedusaOneTrainer.resume if arguments.resume else MedusaOneTrainer
    place = (arguments.output,) if arguments.resume else (config,)
    kept = {} if arguments.resume else {"output_dir": arguments.output}
    trainer = make(*place, data, lm_head, heads=heads, embeddings=embeddings, **kept)
    heads = trainer.train()
    name = arguments.base_model_name or arguments.model
    export_heads(heads, arguments.output, lm_head.shape[0], name)
    held_out.save(arguments.output / HELD_OUT_FILE)
    record = collect_provenance(
        config=dataclasses.asdict(trainer.config), steps=trainer.step,
        seconds=round(trainer.seconds, 1), answers=len(answers),
        answer_tokens=answers.num_answer_tokens, history=trainer.history,
    )  # fmt: skip
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    del data, trainer
    calibrate_heads(model, heads, held_out, arguments.output, arguments)


def run_calibrate(arguments: argparse.Namespace) -> None:
    """Write tree.json for heads that exist."""
    from vllm_medusa.heads import MedusaHeads
    from vllm_medusa.training.base_model import load_base, load_heads_for

    answers = _calibration_answers(arguments)
    model = load_base(arguments.model, arguments.dtype, arguments.device)
    heads = MedusaHeads.from_weights(load_heads_for(model, arguments.heads), model.device)
    calibrate_heads(model, heads, answers, arguments.heads, arguments)


def _calibration_answers(arguments: argparse.Namespace) -> "ConversationSet":
    """Answers to calibrate on: files, or the model's own greedy ones to ``--prompts``."""
    if not arguments.prompts:
        data = arguments.data or [arguments.heads / HELD_OUT_FILE]
        return read_answers(data, arguments.model)
    from vllm_medusa.training.conversations import ConversationSet
    from vllm_medusa.training.prompt_files import read_prompts
    from vllm_medusa.training.served_answers import serve_prompts

    prompts = [p for path in arguments.prompts for p in read_prompts(path).prompts]
    engine = {"model": arguments.model, "dtype": arguments.dtype, **arguments.engine_args}
    sampling = {"temperature": 0.0, "max_tokens": arguments.max_tokens}
    run = serve_prompts(engine, prompts, sampling)
    return ConversationSet.from_pairs((a.prompt_ids, a.token_ids) for a in run.answers)


def run_restrict(arguments: argparse.Namespace) -> None:
    """Write a copy of heads that scores only the data's most frequent tokens."""
    from vllm_medusa.checkpoint import load_heads, save_heads
    from vllm_medusa.training.answer_files import load_answers
    from vllm_medusa.training.vocab_subset import frequent_tokens, restrict_vocabulary

    weights = load_heads(arguments.heads, vocab_size=arguments.vocab_size)
    if weights.spec.vocab_size is None:
        raise ValueError("--vocab-size: the checkpoint does not tell it; give the base model's")
    answers, _ = load_answers(arguments.data)
    ids = frequent_tokens(answers, arguments.count, weights.spec.vocab_size)
    save_heads(restrict_vocabulary(weights, ids), arguments.output, "M")
    inside = covered_share(answers, ids)
    print(f"{arguments.output}: {len(ids)} tokens, {100 * inside:.2f} % of the answers' tokens")


def covered_share(answers: Any, ids: Any) -> float:
    """Share of the answer tokens that are among ``ids``."""
    import numpy as np

    return float(np.isin(answers.token_ids[answers.answer_mask], ids.numpy()).mean())


def calibrate_heads(
    model: Any, heads: Any, answers: Any, directory: Path, arguments: argparse.Namespace
) -> None:
    """Rank the answers' tokens, search the tree, write tree.json and print what to expect."""
    from vllm_medusa.training.calibrate import rank_answers, search_tree
    from vllm_medusa.training.export import export_tree
    from vllm_medusa.training.simulate import simulate_budgets

    ranks = rank_answers(model, heads, answers, arguments.max_rank)
    tree = search_tree(ranks, arguments.num_nodes)
    export_tree(tree, ranks, directory, f"calibrated on {len(answers)} own answers")
    if len(tree.paths) < arguments.num_nodes:
        print(
            f"the tree has {len(tree.paths)} nodes instead of {arguments.num_nodes}: no other path "
            "was ever right; calibrate on more answers or raise --max-rank"
        )
    for k, row in enumerate(ranks.accuracies(), 1):
        print(f"head {k}: top-1 {row[0]:.3f}, top-{len(row)} {row.sum():.3f}")
    for nodes, count in simulate_budgets(ranks.ranks, ranks.offsets, tree.paths).items():
        print(f"{nodes} nodes: {count.tokens_per_step:.3f} tokens per step")
