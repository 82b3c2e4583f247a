"""Served acceptance beside what calibration predicts and what the same answers allow."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_medusa.training.acceptance import AnswerSteps, summarise, tokens_per_step
from vllm_medusa.training.calibrate import HeadRanks
from vllm_medusa.training.config import EvalConfig
from vllm_medusa.training.served_answers import ServedRun
from vllm_medusa.training.simulate import (
    Path_,
    accepted_depths,
    output_depths,
    per_conversation,
    visited_rows,
)
from vllm_medusa.tree import TokenTree

# Served and simulated tokens per step should agree this well; exactly, where the engine and
# transformers compute the same numbers.
GOAL = 0.02


@dataclass(frozen=True)
class Prediction:
    """What a tree.json promises for a tree cut to the served nodes."""

    # 1 + sum of products of head accuracies (paper 2.3.3); None without accuracies
    independent: float | None
    # simulated on the calibration answers; None for other trees than prefixes of the calibrated
    calibrated: float | None
    # [depths] share of steps that reach it, from the same simulation of the whole tree
    by_depth: tuple[float, ...] | None


def predict(tree: TokenTree, paths: Sequence[Path_]) -> Prediction:
    """Expectations for the served ``paths`` from the metadata of the calibrated ``tree``.

    A step reaches a depth when it accepts a node there, and accepts at most one, so the share
    of such steps is the sum of that depth's nodes.
    """
    metadata = tree.metadata
    served = TokenTree.from_paths(paths)
    independent = None
    accuracies = metadata.get("accuracies")
    if accuracies and served.max_depth <= len(accuracies) and served.max_rank < len(accuracies[0]):
        independent = served.expected_tokens(accuracies)
    if served.paths != tree.paths[: served.num_nodes]:
        return Prediction(independent, None, None)
    by_nodes = metadata.get("tokens_per_step_by_nodes") or ()
    calibrated = by_nodes[served.num_nodes - 1] if len(by_nodes) >= served.num_nodes else None
    if calibrated is None and served.num_nodes == tree.num_nodes:
        calibrated = metadata.get("expected_tokens_per_step")
    shares = metadata.get("accepted_shares") or ()
    if len(shares) < served.num_nodes:
        return Prediction(independent, calibrated, None)
    by_depth = [0.0] * served.max_depth
    for path, share in zip(served.paths, shares, strict=False):
        by_depth[len(path) - 1] += share
    return Prediction(independent, calibrated, tuple(by_depth))


def step_rows(answer: AnswerSteps) -> np.ndarray:
    """Row of the answer at which each verification step started, [steps] int64.

    >>> step_rows(AnswerSteps(0, "all", accepted=(2, 0, 1), plain_steps=0)).tolist()
    [0, 3, 4]
    """
    lengths = np.array(answer.accepted, np.int64) + 1
    return np.cumsum(lengths) - lengths


@dataclass(frozen=True)
class NodeCounts:
    """Tree nodes on the accepted paths of served steps."""

    steps: int
    # path -> steps whose accepted path contains it
    accepted: Counter[Path_]
    # steps that the heads' ranks, computed outside the server, do not explain
    unexplained: int

    def by_rank(self, num_heads: int, max_rank: int) -> list[list[float]]:
        """[num_heads][max_rank] share of steps that accepted rank i of head k."""
        table = [[0.0] * max_rank for _ in range(num_heads)]
        for path, count in self.accepted.items():
            table[len(path) - 1][path[-1]] += count / max(self.steps, 1)
        return table


def count_nodes(
    answers: Sequence[AnswerSteps], ranks: HeadRanks, paths: Sequence[Path_]
) -> NodeCounts:
    """Which nodes were accepted: the server tells how many tokens, the ranks tell which.

    Parameters
    ----------
    answers : sequence of AnswerSteps
        In the order of ``ranks.offsets``; answers with plain steps are left out, since the rows
        of their steps are not known.
    """
    nodes = set(paths)
    accepted: Counter[Path_] = Counter()
    steps = unexplained = 0
    for answer, start in zip(answers, ranks.offsets[:-1], strict=True):
        if answer.plain_steps:
            continue
        for row, depth in zip(step_rows(answer), answer.accepted, strict=True):
            steps += 1
            path = tuple(int(rank) for rank in ranks.ranks[start + row, :depth])
            if path and path not in nodes:
                unexplained += 1
                continue
            accepted.update(path[: d + 1] for d in range(depth))
    return NodeCounts(steps, accepted, unexplained)


def served_record(run: ServedRun, config: EvalConfig) -> dict[str, Any]:
    """Statistics of the served steps, over all answers and by category."""
    answers = [AnswerSteps.of(answer) for answer in run.answers]
    depth = max(map(len, run.paths))
    by_category: dict[str, list[AnswerSteps]] = {}
    for answer in answers:
        by_category.setdefault(answer.category, []).append(answer)

    def describe(group: Sequence[AnswerSteps]) -> dict[str, Any]:
        return summarise(group, depth, config.resamples, config.seed)

    return {
        "all": describe(answers),
        "categories": {name: describe(group) for name, group in sorted(by_category.items())},
    }


def simulated_record(run: ServedRun, ranks: HeadRanks) -> dict[str, Any]:
    """Exact simulation of the served tree on the served answers, and how far the server is off."""
    answers = [AnswerSteps.of(answer) for answer in run.answers]
    depths = accepted_depths(ranks.ranks, run.paths)
    rows, total = visited_rows(depths, ranks.offsets)
    reached = output_depths(depths, rows, ranks.offsets)
    each = per_conversation(ranks.ranks, ranks.offsets, run.paths)
    served = tokens_per_step(answers)
    nodes = count_nodes(answers, ranks, run.paths)
    max_rank = max(map(max, run.paths)) + 1
    num_heads = ranks.ranks.shape[1]
    at_steps = HeadRanks(
        ranks.ranks[rows], ranks.has_label[rows], np.array([0, len(rows)]), ranks.max_rank
    )
    return {
        "tokens_per_step": total.tokens_per_step,
        "steps": total.steps,
        "accepted_by_depth": [
            float((reached >= depth).sum() / max(len(rows), 1))
            for depth in range(1, max(map(len, run.paths)) + 1)
        ],
        "relative_difference": served / total.tokens_per_step - 1 if total.steps else 0.0,
        "goal": GOAL,
        "answers_with_equal_steps": sum(
            a.steps == count.steps for a, count in zip(answers, each, strict=True)
        ),
        "head_accuracies": ranks.accuracies().round(6).tolist(),
        "head_accuracies_where_steps_start": at_steps.accuracies().round(6).tolist(),
        "accepted_by_head_and_rank": nodes.by_rank(num_heads, max_rank),
        "accepted_nodes": [
            {"path": list(path), "share": nodes.accepted[path] / max(nodes.steps, 1)}
            for path in run.paths
        ],
        "unexplained_steps": nodes.unexplained,
    }


def evaluation_record(run: ServedRun, ranks: HeadRanks, tree: TokenTree | None,
                      config: EvalConfig) -> dict[str, Any]:  # fmt: skip
    """Everything that ``eval`` measures, as plain JSON values.

    Parameters
    ----------
    run : ServedRun
    ranks : HeadRanks
        Of the labels of ``run``'s answers, in their order.
    tree : TokenTree or None
        The calibrated tree beside the heads.
    config : EvalConfig
    """
    promised = predict(tree, run.paths) if tree is not None else Prediction(None, None, None)
    measured = TokenTree.from_paths(run.paths).expected_tokens(ranks.accuracies().tolist())
    return {
        "tree": {"paths": [list(path) for path in run.paths], "nodes": len(run.paths)},
        "served": served_record(run, config),
        "simulated": simulated_record(run, ranks),
        "predicted": {
            "from_calibrated_accuracies": promised.independent,
            "from_calibration_answers": promised.calibrated,
            "by_depth_from_calibration_answers": promised.by_depth,
            "from_accuracies_on_these_answers": measured,
        },
    }
