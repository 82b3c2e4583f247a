"""Tokens per step of one variant's trees, from the ranks that its heads give the right tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from simulate_trees import BUDGETS, RESAMPLES, steps_by_question

from vllm_medusa.training.acceptance import bootstrap_interval
from vllm_medusa.training.calibrate import HeadRanks, search_tree
from vllm_medusa.training.export import export_tree
from vllm_medusa.training.simulate import accepted_depths, chosen_places, visited_rows


@dataclass(frozen=True)
class AnswerRanks:
    """Ranks on a set of answers, and what each answer is drawn with for intervals."""

    ranks: HeadRanks
    # [answers] int64: answers of one question are drawn together
    groups: np.ndarray
    # the first answers once more, with the log probabilities that trees are chosen by
    chosen: HeadRanks | None = None
    # of sequential heads, all answers: places of the right nodes, as pool_places tells them
    places: np.ndarray | None = None


@dataclass(frozen=True)
class EvaluationJob:
    """What a process needs to evaluate one variant; numbers only, no device."""

    directory: Path
    # to search the tree on
    calibration: HeadRanks
    # name -> answers to test on
    tests: dict[str, AnswerRanks]


def evaluate(job: EvaluationJob) -> dict[str, Any]:
    """Write the variant's tree.json and return its table."""
    tree = search_tree(job.calibration, BUDGETS[-1])
    answers = len(job.calibration.offsets) - 1
    export_tree(tree, job.calibration, job.directory, f"calibrated on {answers} own answers")
    return {
        name: {
            "answers": len(test.groups),
            "answer_tokens": int(test.ranks.offsets[-1]),
            "top_1": test.ranks.accuracies()[:, 0].round(4).tolist(),
            "top_10": test.ranks.accuracies()[:, :10].sum(1).round(4).tolist(),
            "static": _static(test, tree.paths),
            **_dynamic(test),
        }
        for name, test in job.tests.items()
    }


def _static(test: AnswerRanks, paths: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    return {
        str(nodes): _row(accepted_depths(test.ranks.ranks, paths[:nodes]), test)
        for nodes in BUDGETS
    }


def _dynamic(test: AnswerRanks) -> dict[str, Any]:
    """Trees chosen at every step, on the answers whose log probabilities are known."""
    if test.places is not None:
        depths = {nodes: (test.places < nodes).sum(1) for nodes in BUDGETS}
        return {"dynamic": {str(n): _row(found, test) for n, found in depths.items()}}
    ranks = test.chosen
    if ranks is None or ranks.log_probs is None:
        return {}
    count = len(ranks.offsets) - 1
    cut = AnswerRanks(ranks, test.groups[:count])
    places = chosen_places(ranks.ranks, ranks.log_probs, BUDGETS[-1])
    found = {str(nodes): _row((places < nodes).sum(1), cut) for nodes in BUDGETS}
    return {"dynamic": found, "dynamic_answers": count}


def _row(depths: np.ndarray, test: AnswerRanks) -> dict[str, Any]:
    offsets = test.ranks.offsets
    steps = steps_by_question(depths, offsets)
    tokens = np.maximum(np.diff(offsets) - 1, 0)
    _, group = np.unique(test.groups, return_inverse=True)
    steps = np.bincount(group, steps).astype(np.int64)
    tokens = np.bincount(group, tokens).astype(np.int64)
    low, high = bootstrap_interval(tokens.tolist(), steps.tolist(), RESAMPLES, 0)
    starts = depths[visited_rows(depths, offsets)[0]]
    return {
        "tokens_per_step": round(float(tokens.sum() / max(steps.sum(), 1)), 4),
        "interval": [round(low, 4), round(high, 4)],
        "accepted_by_depth": [
            round(float((starts >= depth).mean()), 4)
            for depth in range(1, test.ranks.ranks.shape[1] + 1)
        ],
    }
