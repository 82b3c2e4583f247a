"""What drafts gain that know the sampler's noise, in tokens per step; simulated exactly.

    python benchmarks/simulate_coupled.py --model MODEL --heads DIR DIR --work-dir DIR \
        --out record.json

Plain vLLM answers MT-Bench questions at a temperature, a seed each.  A tree is verified by the very
tokens that are drawn so, whatever it holds, and its drafts only decide how many of them one step
yields.  One pass over the answers therefore tells the steps of drafts by the heads alone, and of
drafts that add the noise of the draws to come (Gumbel coupling): with one tree, with trees chosen
at every step, and with the continuation that a request's own history proposes.  Heads score the
first ids alone, as served.  The ratio's interval is drawn over questions, both sides of each
together.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from greedy_answers import TestAnswers, chosen_questions
from records import write_record
from sampled_answers import DrawnRows, check_redrawn, redrawn_share, sampled_answers
from simulate_lookup import Continuations, find_continuations, head_costs, merge
from simulate_trees import BUDGETS, QUESTIONS, RESAMPLES, steps_by_question
from variant_pools import pool_costs, ranks_in_pool, score_pool

from vllm_medusa.config import DEFAULT_LOOKUP
from vllm_medusa.draft_vocabulary import DEFAULT_SHARE, cut_lm_head
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.kernels import top_tokens
from vllm_medusa.prompt_lookup import chain_costs
from vllm_medusa.training.acceptance import bootstrap_interval
from vllm_medusa.training.base_model import (
    embedding_weight,
    lm_head_weight,
    load_base,
    load_heads_for,
)
from vllm_medusa.training.calibrate import MISSED, HeadRanks
from vllm_medusa.training.hidden_states import HiddenStateSet, extract_hidden_states
from vllm_medusa.training.loss import IGNORE
from vllm_medusa.training.simulate import accepted_depths, chosen_places, pool_places
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_candidates import FIRST_RANKS, NOISE_SPREAD

TREES = ("one tree", "chosen", "chosen, lookup")
# Rows that heads draft for at once; their noise over the vocabulary fits a processor's cache.
_AT_ONCE = 16


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="target model directory")
    parser.add_argument("--heads", required=True, nargs="+", help="directories with a tree.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--work-dir", type=Path, required=True, help="for the answers")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--spread", type=float, default=NOISE_SPREAD, help="errors of the heads")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--num-questions", type=int, default=80, help="spread over categories")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


@dataclass(frozen=True)
class Drafts:
    """What heads drafted at every row, ready to be counted.

    Attributes
    ----------
    found : HeadRanks
        Log probabilities of every head's best tokens; of sequential heads those of the nodes of
        ``paths``, [rows, nodes].
    paths : tuple of tuple of int
        The fixed tree, from which sequential heads' nodes are chosen.
    sequential : bool
    """

    found: HeadRanks
    paths: tuple[tuple[int, ...], ...]
    sequential: bool

    def depths(self, before: Continuations, chain: np.ndarray) -> dict[str, list[np.ndarray]]:
        """Tokens that a step at each row accepts, by kind of tree and for every budget.

        Parameters
        ----------
        before : Continuations
        chain : numpy.ndarray, [rows, length] float32
            Price of the continuation's node of each depth.
        """
        ranks, log_probs = self.found.ranks, self.found.log_probs
        if self.sequential:
            places = pool_places(ranks, log_probs, self.paths)
            costs = dict.fromkeys(BUDGETS, pool_costs(ranks, log_probs, self.paths))
        else:
            places = chosen_places(ranks, log_probs, BUDGETS[-1])
            costs = {budget: head_costs(self.found, budget) for budget in BUDGETS}
        one_tree, chosen, merged = TREES
        return {
            one_tree: [accepted_depths(ranks, self.paths[:budget]) for budget in BUDGETS],
            chosen: [(places < budget).sum(1) for budget in BUDGETS],
            merged: [merge(*costs[n], chain, before.right, n) for n in BUDGETS],
        }


@torch.inference_mode()
def rank_drafts(
    heads: MedusaHeads, data: HiddenStateSet, drawn: DrawnRows | None, spread: float
) -> HeadRanks:
    """Best tokens of independent heads at every row, as drafted; ``drawn``: with its noise."""
    num_heads, rows_in_all = heads.spec.num_heads, data.num_rows
    shape = (rows_in_all, num_heads, FIRST_RANKS)
    tokens, log_probs = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    for start in range(0, rows_in_all, _AT_ONCE):
        rows = slice(start, min(start + _AT_ONCE, rows_in_all))
        top_tokens(
            tokens[rows], log_probs[rows], heads.draft_logits(data.hidden[rows]),
            token_map=heads.token_map,
            noise=None if drawn is None else drawn.noise(rows, spread),
        )  # fmt: skip
    labels = data.labels[:, 1 : num_heads + 1]
    hits = tokens == labels[..., None]
    ranks = torch.where(hits.any(2), hits.int().argmax(2), MISSED).numpy()
    return HeadRanks(
        ranks, (labels != IGNORE).numpy(), data.offsets, FIRST_RANKS, log_probs.numpy()
    )


def draft(
    heads: MedusaHeads,
    tree: TokenTree,
    data: HiddenStateSet,
    embeddings: torch.Tensor,
    drawn: DrawnRows | None,
    spread: float,
) -> Drafts:
    """Draft at every row as it is served, by the heads alone or with the noise of ``drawn``."""
    if not heads.spec.sequential:
        return Drafts(rank_drafts(heads, data, drawn, spread), tree.paths, False)
    noise_of = None if drawn is None else lambda rows: drawn.noise(rows, spread)
    tokens, log_probs = score_pool(heads, tree.paths, data, embeddings, noise_of=noise_of)
    labels = data.labels[:, 1 : heads.spec.num_heads + 1].numpy()
    ranks = ranks_in_pool(tokens, labels, tree.paths)
    found = HeadRanks(ranks, labels != IGNORE, data.offsets, tree.max_rank + 1, log_probs)
    return Drafts(found, tree.paths, True)


def pair_of(alone: np.ndarray, coupled: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
    """Tokens per step of two ways to draft, [rows] int64 accepted each, and their ratio."""
    tokens, pair = (np.diff(offsets) - 1).tolist(), {}
    steps = {
        name: steps_by_question(depths, offsets).tolist()
        for name, depths in (("alone", alone), ("coupled", coupled))
    }
    for name, own in steps.items():
        pair[name] = sum(tokens) / sum(own)
        pair[f"{name}_interval"] = bootstrap_interval(tokens, own, RESAMPLES, 0)
    # The same tokens in other steps.
    pair["ratio"] = pair["coupled"] / pair["alone"]
    pair["ratio_interval"] = bootstrap_interval(*steps.values(), RESAMPLES, 0)
    return pair


def compare(alone: Drafts, coupled: Drafts, test: TestAnswers) -> list[dict[str, Any]]:
    """Both ways to draft by budget and kind of tree."""
    answers, offsets = test.answers, alone.found.offsets
    parts = [(answers.tokens(i), answers.mask(i)) for i in range(len(answers))]
    pairs = [(tokens[~mask].tolist(), tokens[mask].tolist()) for tokens, mask in parts]
    before = find_continuations(pairs, DEFAULT_LOOKUP)
    chain = chain_costs(before.length)[before.matches]
    depths = [drafts.depths(before, chain) for drafts in (alone, coupled)]
    return [
        {"nodes": nodes}
        | {kind: pair_of(*(found[kind][place] for found in depths), offsets) for kind in TREES}
        for place, nodes in enumerate(BUDGETS)
    ]


def main() -> None:
    """Answer, draft both ways, simulate, print, record."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    test = sampled_answers(
        args.work_dir / f"mt_bench_{args.temperature:g}.safetensors",
        chosen_questions(args.questions, args.num_questions, 1),
        {"model": args.model, "dtype": args.dtype, "max_model_len": 2048, "enforce_eager": True},
        {"temperature": args.temperature, "max_tokens": args.max_tokens},
    )
    model = load_base(args.model, args.dtype, "cpu")
    lm_head, embeddings = lm_head_weight(model), embedding_weight(model)
    target = SimpleNamespace(lm_head=SimpleNamespace(weight=lm_head))
    size, drawn = len(lm_head) // DEFAULT_SHARE, DrawnRows.of(test, args.temperature)
    record: dict[str, Any] = {
        "benchmark": "coupled_drafts", "model": Path(args.model).name, "dtype": args.dtype,
        "num_questions": args.num_questions, "max_tokens": args.max_tokens,
        "temperature": args.temperature, "spread": args.spread, "draft_vocab_size": size,
        "heads": {},
    }  # fmt: skip
    for directory in map(Path, args.heads):
        weights = cut_lm_head(load_heads_for(model, directory), target, size)
        heads = MedusaHeads.from_weights(weights)
        tree = TokenTree.load(directory / "tree.json")
        data = extract_hidden_states(model, test.answers, weights.spec.num_heads)
        if not record["heads"]:
            record["answer_tokens"] = data.num_rows
            record["redrawn"] = redrawn_share(data, lm_head, drawn)
            print(f"{record['redrawn']:.2%} of {data.num_rows} tokens drawn again", flush=True)
            check_redrawn(record["redrawn"])
        sides = [
            draft(heads, tree, data, embeddings, way, args.spread) for way in (None, drawn)
        ]
        rows = compare(*sides, test)
        for row in rows:
            cells = [
                f"{kind} {row[kind]['alone']:.3f}, coupled {row[kind]['coupled']:.3f}"
                for kind in TREES
            ]
            print(f"{directory.name} {row['nodes']:>3} nodes: " + "; ".join(cells), flush=True)
        record["heads"][directory.name] = {"sequential": weights.spec.sequential, "rows": rows}
        write_record(args.out, record)


if __name__ == "__main__":
    main()
