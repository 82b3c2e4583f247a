"""Tokens per step of trees chosen at every step, beside the calibrated tree; simulated exactly.

    python benchmarks/simulate_trees.py --model MODEL --heads HEADS --out record.json

Plain vLLM answers MT-Bench questions greedily.  Under greedy verification those answers decide
which nodes of a tree are accepted, so one pass of the model over them tells the steps that any
tree takes: the calibrated one beside the heads, cut to each budget, the likeliest paths by the
heads' probabilities at the step, and the same with the served weights of the later heads; and
these with the continuation that a request's own history proposes (see ``simulate_lookup``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from records import write_record
from simulate_lookup import find_continuations, merged_depths

from vllm_medusa.config import DEFAULT_LOOKUP
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.training.acceptance import bootstrap_interval
from vllm_medusa.training.base_model import load_base, load_heads_for
from vllm_medusa.training.calibrate import HeadRanks, rank_answers
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.prompt_files import choose_prompts, read_prompts
from vllm_medusa.training.served_answers import serve_prompts
from vllm_medusa.training.simulate import accepted_depths, chosen_places, visited_rows
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_candidates import FIRST_RANKS

QUESTIONS = Path(__file__).parent / "data" / "mt_bench_questions.jsonl"
BUDGETS = (4, 8, 16, 32, 63)
RESAMPLES = 2000


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="target model directory")
    parser.add_argument("--heads", required=True, help="Medusa heads with a tree.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--num-questions", type=int, default=80, help="spread over categories")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--gpu-memory-utilization", type=float, help="as vLLM's option")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None, help="of the pass over the answers")
    parser.add_argument("--rows", type=Path, help=".npz for the ranks and log probabilities")
    return parser.parse_args()


Pairs = list[tuple[list[int], list[int]]]


def answer_and_rank(args: argparse.Namespace) -> tuple[HeadRanks, Pairs]:
    """What every head thinks of the tokens of the model's own first answers, and these."""
    prompts = choose_prompts(read_prompts(args.questions).prompts, args.num_questions)
    engine = {"model": args.model, "dtype": args.dtype, "max_model_len": args.max_model_len}
    if args.gpu_memory_utilization is not None:
        engine["gpu_memory_utilization"] = args.gpu_memory_utilization
    run = serve_prompts(engine, prompts, {"temperature": 0.0, "max_tokens": args.max_tokens})
    firsts: dict[int, tuple] = {}
    for answer in run.answers:
        firsts.setdefault(answer.prompt_index, (answer.prompt_ids, answer.token_ids))
    model = load_base(args.model, args.dtype, args.device)
    heads = MedusaHeads.from_weights(load_heads_for(model, args.heads), model.device)
    answers = ConversationSet.from_pairs(firsts.values())
    ranks = rank_answers(model, heads, answers, FIRST_RANKS, with_log_probs=True)
    return ranks, list(firsts.values())


def steps_by_question(depths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[questions] int64: steps that each answer takes."""
    rows, _ = visited_rows(depths, offsets)
    return np.histogram(rows, offsets)[0]


def compare(ranks: HeadRanks, tree: TokenTree, pairs: Pairs) -> list[dict[str, Any]]:
    """Tokens per step of every kind of tree, by budget."""
    found_before = find_continuations(pairs, DEFAULT_LOOKUP)
    tokens = np.diff(ranks.offsets) - 1
    num_heads = ranks.ranks.shape[1]
    places = {
        name: chosen_places(ranks.ranks, ranks.log_probs, BUDGETS[-1], weights)
        for name, weights in (("chosen, plain", [1.0] * num_heads), ("chosen", None))
    }
    rows = []
    for budget in BUDGETS:
        depths = {"calibrated": accepted_depths(ranks.ranks, tree.paths[:budget])}
        depths |= {name: (found < budget).sum(1) for name, found in places.items()}
        depths |= merged_depths(ranks, found_before, budget)
        row: dict[str, Any] = {"nodes": budget}
        for name, found in depths.items():
            steps = steps_by_question(found, ranks.offsets)
            row[name] = {
                "tokens_per_step": float(tokens.sum() / steps.sum()),
                "interval": bootstrap_interval(tokens.tolist(), steps.tolist(), RESAMPLES, 0),
                "accepted_by_depth": [
                    float((found[visited_rows(found, ranks.offsets)[0]] >= depth).mean())
                    for depth in range(1, max(num_heads, int(found.max(initial=0))) + 1)
                ],
            }
        rows.append(row)
    return rows


def main() -> None:
    """Answer, rank, simulate, print, record."""
    args = parse_args()
    tree = TokenTree.load(Path(args.heads) / "tree.json")
    ranks, pairs = answer_and_rank(args)
    if args.rows is not None:
        np.savez(args.rows, ranks=ranks.ranks, log_probs=ranks.log_probs, offsets=ranks.offsets)
    rows = compare(ranks, tree, pairs)
    for row in rows:
        cells = [f"{k} {v['tokens_per_step']:.3f}" for k, v in row.items() if k != "nodes"]
        print(f"{row['nodes']:>3} nodes: " + ", ".join(cells), flush=True)
    record = {
        "benchmark": "simulate_trees", "model": Path(args.model).name,
        "heads": Path(args.heads).name, "num_questions": args.num_questions,
        "max_tokens": args.max_tokens, "dtype": args.dtype,
        "answer_tokens": int(ranks.offsets[-1]), "rows": rows,
    }  # fmt: skip
    write_record(args.out, record)


if __name__ == "__main__":
    main()
