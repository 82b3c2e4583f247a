"""Trained heads beside each other on one set of answers, simulated exactly.

    python benchmarks/compare_heads.py --model MODEL --heads NAME=DIR NAME=DIR \
        --calibration held_out.safetensors --work-dir DIR --out record.json

vLLM answers the MT-Bench questions greedily.  Under greedy verification those answers decide which
nodes of a tree are accepted, so one pass of the model over them tells the steps that any heads and
any tree take.  Every NAME gets a tree.json in DIR/NAME, searched on the calibration answers, whose
first nodes are its static trees; independent heads also get trees chosen at every step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from greedy_answers import chosen_questions, served_answers
from records import write_record
from simulate_trees import QUESTIONS
from variant_bases import MOST_HEADS
from variant_eval import AnswerRanks, EvaluationJob, evaluate

from vllm_medusa.heads import MedusaHeads
from vllm_medusa.training.answer_files import load_answers
from vllm_medusa.training.base_model import (
    embedding_weight,
    lm_head_weight,
    load_base,
    load_heads_for,
)
from vllm_medusa.training.calibrate import HeadRanks, rank_labels
from vllm_medusa.training.hidden_states import HiddenStateSet, extract_hidden_states
from vllm_medusa.tree_candidates import FIRST_RANKS


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model directory")
    parser.add_argument("--heads", required=True, nargs="+", metavar="NAME=DIR")
    parser.add_argument("--calibration", required=True, help="own answers, not trained on")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--work-dir", type=Path, required=True, help="trees and test answers")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--num-questions", type=int, default=80, help="spread over categories")
    parser.add_argument("--turns", type=int, default=1, help="of each question")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a forward pass")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def rank(model: Any, heads: MedusaHeads, data: HiddenStateSet, log_probs: bool) -> HeadRanks:
    """What the heads think of the right tokens; of sequential ones no log probabilities."""
    sequential = heads.spec.sequential
    embeddings = embedding_weight(model) if sequential else None
    return rank_labels(
        heads, data, lm_head_weight(model), FIRST_RANKS, embeddings=embeddings,
        with_log_probs=log_probs and not sequential,
    )  # fmt: skip


def main() -> None:
    """Answer, rank, search trees, simulate, record."""
    args = parse_args()
    engine = {"model": args.model, "dtype": args.dtype, "max_model_len": 2048}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    test = served_answers(
        args.work_dir / "mt_bench.safetensors",
        chosen_questions(args.questions, args.num_questions, args.turns), engine, args.max_tokens,
    )  # fmt: skip
    calibration, _ = load_answers([args.calibration])
    model = load_base(args.model, args.dtype, args.device)
    sets = [
        extract_hidden_states(model, answers, MOST_HEADS, args.batch_tokens)
        for answers in (calibration, test.answers)
    ]
    record: dict[str, Any] = {
        "benchmark": "compare_heads", "model": Path(args.model).name, "dtype": args.dtype,
        "num_questions": args.num_questions, "turns": args.turns, "max_tokens": args.max_tokens,
        "calibration_answers": len(calibration), "calibration_tokens": sets[0].num_rows,
        "greedy": True, "variants": {},
    }  # fmt: skip
    for item in args.heads:
        name, _, directory = item.partition("=")
        started = time.monotonic()
        heads = MedusaHeads.from_weights(load_heads_for(model, directory), model.device)
        found = rank(model, heads, sets[0], False)
        ranks = rank(model, heads, sets[1], True)
        tests = {"mt_bench": AnswerRanks(ranks, test.questions, ranks)}
        target = args.work_dir / name
        target.mkdir(exist_ok=True)
        job = EvaluationJob(target, found, tests)
        spec = heads.spec
        record["variants"][name] = {
            "num_heads": spec.num_heads, "num_layers": spec.num_layers,
            "sequential": spec.sequential,
            "calibration_top_1": np.round(found.accuracies()[:, 0], 4).tolist(),
            "trees": evaluate(job), "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        print(name, record["variants"][name]["trees"], flush=True)
        write_record(args.out, record)


if __name__ == "__main__":
    main()
