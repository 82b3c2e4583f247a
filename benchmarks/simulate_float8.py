"""What rounding the heads' weights to float8 costs in tokens per step; simulated exactly.

    python benchmarks/simulate_float8.py --model MODEL --heads DIR DIR --work-dir DIR \
        --out record.json

vLLM answers MT-Bench questions greedily.  Under greedy verification those answers decide
which nodes are accepted, so one pass over them tells the steps of heads as the checkpoint has them
and of the same heads rounded as a GPU serves them: layers, and the rows of the model's lm_head for
the first ids, which a draft vocabulary cuts out.  Trees are chosen at every step.  The ratio's
interval is drawn over questions, both sides of each together.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from greedy_answers import chosen_questions, served_answers
from records import write_record
from simulate_trees import BUDGETS, QUESTIONS, RESAMPLES, steps_by_question
from variant_pools import places_in_pool

from vllm_medusa.draft_vocabulary import DEFAULT_SHARE, cut_lm_head
from vllm_medusa.draft_weights import to_float8_rows
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.heads_path import head_rows
from vllm_medusa.training.acceptance import bootstrap_interval
from vllm_medusa.training.base_model import (
    embedding_weight,
    lm_head_weight,
    load_base,
    load_heads_for,
)
from vllm_medusa.training.calibrate import rank_labels
from vllm_medusa.training.hidden_states import HiddenStateSet, extract_hidden_states
from vllm_medusa.training.simulate import chosen_places
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_candidates import FIRST_RANKS


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="target model directory")
    parser.add_argument("--heads", required=True, nargs="+", help="directories with a tree.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--work-dir", type=Path, required=True, help="for the answers")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--num-questions", type=int, default=80, help="spread over categories")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def rounded(weights: HeadWeights) -> HeadWeights:
    """The same heads with the numbers that float8 leaves of their matrices."""

    def back(tensor: torch.Tensor) -> torch.Tensor:
        numbers, scale = to_float8_rows(tensor)
        return (numbers.float() * scale[..., None]).to(tensor.dtype)

    spec, weight, path_weight = weights.spec, back(weights.weight), weights.path_weight
    if spec.sequential:
        # The matrices of a first layer lie side by side, so its rows have one factor for all.
        path_weight = path_weight.clone()
        for index in range(spec.num_heads):
            rows = head_rows(index + 1)
            parts = [weights.weight[0, index], *weights.path_weight[rows]]
            first, *rest = back(torch.cat(parts, dim=1)).chunk(len(parts), dim=1)
            weight[0, index], path_weight[rows] = first, torch.stack(rest)
    return dataclasses.replace(
        weights, weight=weight, path_weight=path_weight, lm_head=back(weights.lm_head)
    )


def places(weights: HeadWeights, tree: TokenTree, data: HiddenStateSet, model: Any) -> np.ndarray:
    """Places of every row's right nodes among those of the tree that is chosen there."""
    lm_head, sequential = lm_head_weight(model), weights.spec.sequential
    heads = MedusaHeads.from_weights(weights, data.hidden.device)
    embeddings = embedding_weight(model) if sequential else None
    ranks = rank_labels(
        heads, data, lm_head, FIRST_RANKS, embeddings=embeddings, with_log_probs=not sequential
    )
    if sequential:
        return places_in_pool(heads, tree.paths, data, ranks.ranks, embeddings, lm_head)
    return chosen_places(ranks.ranks, ranks.log_probs, BUDGETS[-1])


def compare(plain: np.ndarray, float8: np.ndarray, offsets: np.ndarray) -> list[dict[str, Any]]:
    """Tokens per step of both by budget, and their ratio."""
    tokens, rows = np.diff(offsets) - 1, []
    for nodes in BUDGETS:
        steps = {
            name: steps_by_question((found < nodes).sum(1), offsets)
            for name, found in (("unquantised", plain), ("float8", float8))
        }
        row = {name: float(tokens.sum() / found.sum()) for name, found in steps.items()}
        # The same tokens in other steps.
        pair = steps["unquantised"].tolist(), steps["float8"].tolist()
        rows.append({
            "nodes": nodes, **row, "ratio": row["float8"] / row["unquantised"],
            "ratio_interval": bootstrap_interval(*pair, RESAMPLES, 0),
        })  # fmt: skip
    return rows


def main() -> None:
    """Answer, draft both ways, simulate, print, record."""
    args = parse_args()
    engine = {"model": args.model, "dtype": args.dtype, "max_model_len": 2048}
    args.work_dir.mkdir(parents=True, exist_ok=True)
    test = served_answers(
        args.work_dir / "mt_bench.safetensors",
        chosen_questions(args.questions, args.num_questions, 1), engine, args.max_tokens,
    )  # fmt: skip
    model = load_base(args.model, args.dtype, args.device)
    size = len(lm_head_weight(model)) // DEFAULT_SHARE
    target = SimpleNamespace(lm_head=SimpleNamespace(weight=lm_head_weight(model)))
    record: dict[str, Any] = {
        "benchmark": "float8_heads", "model": Path(args.model).name, "dtype": args.dtype,
        "num_questions": args.num_questions, "max_tokens": args.max_tokens,
        "draft_vocab_size": size, "greedy": True, "heads": {},
    }  # fmt: skip
    for directory in args.heads:
        weights = cut_lm_head(load_heads_for(model, directory), target, size)
        tree = TokenTree.load(Path(directory) / "tree.json")
        data = extract_hidden_states(model, test.answers, weights.spec.num_heads)
        record["answer_tokens"] = data.num_rows
        both = (places(heads, tree, data, model) for heads in (weights, rounded(weights)))
        rows = compare(*both, data.offsets)
        for row in rows:
            low, high = row["ratio_interval"]
            print(
                f"{Path(directory).name} {row['nodes']:>3} nodes: {row['unquantised']:.3f}, float8 "
                f"{row['float8']:.3f}, ratio {row['ratio']:.4f} ({low:.4f}-{high:.4f})",
                flush=True,
            )
        record["heads"][Path(directory).name] = {
            "sequential": weights.spec.sequential,
            "rows": rows,
        }
        write_record(args.out, record)


if __name__ == "__main__":
    main()
