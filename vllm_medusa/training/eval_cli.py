"""Subcommand eval: acceptance of heads on a prompt set through a real engine."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_medusa.config import MAX_TREE_NODES
from vllm_medusa.training.config import EvalConfig
from vllm_medusa.training.config_options import (
    add_config_options,
    add_engine_args,
    config_from_options,
)
from vllm_medusa.training.prompt_files import choose_prompts, read_prompts

RECORD_FILE = "eval.json"
CONFIG_FILE = "eval_config.json"


def add_eval_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa eval --model M --heads DIR --prompts FILE``."""
    parser = subparsers.add_parser(
        "eval",
        help="measure acceptance on a prompt set and compare it with the prediction",
        description=(
            "Answer prompts with vLLM and the heads. Shows tokens per step with intervals, by "
            "category, depth, head and rank, beside the calibrated tree's prediction and the "
            "exact simulation on the same answers."
        ),
    )
    parser.add_argument("--model", required=True, help="base model, folder or hub id")
    parser.add_argument("--heads", required=True, help="head checkpoint")
    parser.add_argument("--prompts", required=True, nargs="+", help="prompt files")
    parser.add_argument("--output", type=Path, help="folder for eval.json and the plots")
    parser.add_argument("--device", default=None, help="of the simulation; default: cuda if any")
    add_engine_args(parser)
    add_config_options(parser, EvalConfig)
    parser.set_defaults(run=run_eval)


def run_eval(arguments: argparse.Namespace) -> None:
    """Serve, simulate, report."""
    from vllm_medusa.provenance import collect_provenance
    from vllm_medusa.training.eval_report import print_evaluation, save_plots
    from vllm_medusa.training.evaluate import evaluation_record
    from vllm_medusa.training.served_answers import serve_prompts

    config = config_from_options(EvalConfig, arguments)
    files = [read_prompts(path) for path in arguments.prompts]
    prompts = choose_prompts([p for file in files for p in file.prompts], config.limit)
    skipped = {str(file.path): dict(file.skipped) for file in files if file.skipped}
    sampling: dict[str, Any] = {
        "temperature": config.temperature, "max_tokens": config.max_tokens,
    }  # fmt: skip
    if config.temperature > 0:
        sampling["seed"] = config.seed
    run = serve_prompts(_engine_args(arguments, config), prompts, sampling)
    ranks, tree = _rank_answers(arguments, config, run)
    record = {
        "provenance": collect_provenance(config=asdict(config)),
        "model": arguments.model, "heads": arguments.heads, "prompt_files": arguments.prompts,
        "skipped_rows": skipped, **evaluation_record(run, ranks, tree, config),
    }  # fmt: skip
    print_evaluation(record)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        config.save(arguments.output / CONFIG_FILE)
        (arguments.output / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
        plots = save_plots(record, arguments.output)
        print(f"{arguments.output}: {RECORD_FILE}, {', '.join(plot.name for plot in plots)}")


def _engine_args(arguments: argparse.Namespace, config: EvalConfig) -> dict[str, Any]:
    # One tree at all batch sizes, over the whole vocabulary: that is what is simulated.
    speculation: dict[str, Any] = {
        "method": "medusa", "model": arguments.heads, "draft_vocab_size": 0,
        "num_speculative_tokens_per_batch_size": [[1, 1, MAX_TREE_NODES]],
    }  # fmt: skip
    if config.tree is not None:
        speculation["tree"] = config.tree
    if config.nodes is not None:
        speculation["num_speculative_tokens"] = config.nodes
    return {
        "model": arguments.model, "dtype": config.dtype, "seed": config.seed,
        "speculative_config": speculation, **arguments.engine_args,
    }  # fmt: skip


def _rank_answers(arguments: argparse.Namespace, config: EvalConfig, run: Any) -> tuple[Any, Any]:
    """Ranks that the heads give the served tokens, and the tree.json beside the heads."""
    from vllm_medusa.heads import MedusaHeads
    from vllm_medusa.training.base_model import load_base, load_heads_for
    from vllm_medusa.training.calibrate import rank_answers
    from vllm_medusa.training.conversations import ConversationSet
    from vllm_medusa.tree import TokenTree

    model = load_base(arguments.model, config.dtype, arguments.device)
    weights = load_heads_for(model, arguments.heads)
    heads = MedusaHeads.from_weights(weights, model.device)
    answers = ConversationSet.from_pairs((a.prompt_ids, a.token_ids) for a in run.answers)
    max_rank = max(max(map(max, run.paths)) + 1, 10)
    tree = TokenTree.load(weights.tree_path) if weights.tree_path else None
    return rank_answers(model, heads, answers, max_rank), tree
