"""Acceptance statistics against hand counts, and their agreement with the simulation."""

import numpy as np
import pytest

from vllm_medusa.training.acceptance import (
    AnswerSteps,
    bootstrap_interval,
    rate_by_depth,
    summarise,
    tokens_per_step,
)
from vllm_medusa.training.calibrate import MISSED, HeadRanks
from vllm_medusa.training.config import EvalConfig
from vllm_medusa.training.eval_cli import choose_prompts
from vllm_medusa.training.eval_report import print_evaluation, save_plots, tree_layout
from vllm_medusa.training.evaluate import count_nodes, evaluation_record, predict, step_rows
from vllm_medusa.training.prompt_files import Prompt
from vllm_medusa.training.served_answers import ServedAnswer, ServedRun
from vllm_medusa.training.simulate import accepted_depths
from vllm_medusa.tree import TokenTree

PATHS = ((0,), (0, 0), (1,), (0, 1), (0, 0, 0))


def _served(tokens, accepted, prompt=0, category="all"):
    return ServedAnswer(prompt, category, (1,), tuple(range(tokens)), tuple(accepted))


@pytest.mark.parametrize(
    ("tokens", "accepted", "kept", "plain"),
    [
        (8, (2, 0, 2), (2, 0, 2), 0),  # 1 + 3 + 1 + 3
        (7, (2, 0, 2), (2, 0, 1), 0),  # the last step ran past the end by one
        (6, (2, 0, 2), (2, 0, 0), 0),
        (5, (2, 0, 2), (2, 0), 0),  # a step under way when the answer ended
        (9, (2, 0, 2), (2, 0, 2), 1),  # one token came from a step without drafts
        (1, (), (), 0),  # only the prompt's own token
    ],
)
def test_steps_count_output_only(tokens, accepted, kept, plain):
    steps = AnswerSteps.of(_served(tokens, accepted))
    assert (steps.accepted, steps.plain_steps) == (kept, plain)
    assert steps.tokens == max(tokens - 1, 0)
    assert steps.steps == len(kept) + plain


def test_rates_by_hand():
    answers = [AnswerSteps(0, "a", (2, 0), 0), AnswerSteps(1, "a", (1,), 1)]
    assert tokens_per_step(answers) == 7 / 4  # tokens 4 + 3, steps 2 + 2
    assert rate_by_depth(answers, 3) == [2 / 4, 1 / 4, 0]


def test_interval_is_the_bootstrap_over_prompts():
    tokens, steps = [10, 30, 12], [10, 10, 8]
    low, high = bootstrap_interval(tokens, steps, resamples=4000, seed=0)
    # All 27 equally likely draws, with their 2.5 % and 97.5 % points.
    draws = np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1)
    ratios = np.sort(np.array(tokens)[draws].sum(0) / np.array(steps)[draws].sum(0))
    # The tails hold one draw each (1/27 > 2.5 %), so the points are the extremes.
    assert (low, high) == (ratios[0], ratios[-1]) == (1.0, 3.0)
    assert bootstrap_interval([6], [3], 10, 0) == (2.0, 2.0)
    assert bootstrap_interval(tokens, steps, 50, 3) == bootstrap_interval(tokens, steps, 50, 3)


def test_turns_of_one_prompt_are_one_draw():
    answers = [AnswerSteps(0, "a", (1, 1), 0), AnswerSteps(0, "a", (0,), 0)]
    found = summarise(answers, 2, 100, 0)
    assert (found["prompts"], found["answers"], found["steps"]) == (1, 2, 3)
    assert found["interval"] == [5 / 3, 5 / 3]


def _random_run(seed, vocabulary_hits=0.6, answers=12):
    """Ranks at random, and a server that decodes with exactly these ranks."""
    rng = np.random.default_rng(seed)
    rows, labels, lengths, served = [], [], [], []
    for i in range(answers):
        length = int(rng.integers(1, 30))
        ranks = rng.integers(0, 2, (length, 3))
        ranks[rng.random((length, 3)) > vocabulary_hits] = MISSED
        has = np.array([[row + k < length for k in (1, 2, 3)] for row in range(length)])
        ranks[~has] = MISSED
        depths = accepted_depths(ranks, PATHS)
        row, accepted = 0, []
        while row < length - 1:
            accepted.append(int(depths[row]))
            row += accepted[-1] + 1
        if accepted and rng.random() < 0.3:
            accepted[-1] += 1  # accepted beyond the end: no output
        served.append(ServedAnswer(i, "ab"[i % 2], (1,), tuple(range(length)), tuple(accepted)))
        rows.append(ranks)
        labels.append(has)
        lengths.append(length)
    ranks = HeadRanks(np.concatenate(rows), np.concatenate(labels), np.cumsum([0, *lengths]), 3)
    return ServedRun(tuple(served), PATHS), ranks


@pytest.mark.parametrize("seed", range(4))
def test_served_equals_simulated_when_the_ranks_are_the_servers(seed):
    run, ranks = _random_run(seed)
    record = evaluation_record(run, ranks, None, EvalConfig(resamples=20))
    served, simulated = record["served"]["all"], record["simulated"]
    assert simulated["relative_difference"] == 0
    assert simulated["steps"] == served["steps"]
    assert simulated["accepted_by_depth"] == pytest.approx(served["accepted_by_depth"])
    assert simulated["answers_with_equal_steps"] == len(run.answers)
    assert simulated["unexplained_steps"] == 0
    by_head = [sum(row) for row in simulated["accepted_by_head_and_rank"]]
    assert by_head == pytest.approx(served["accepted_by_depth"])
    parts = record["served"]["categories"]
    assert set(parts) == {"a", "b"}
    assert sum(part["tokens"] for part in parts.values()) == served["tokens"]


def test_node_counts_by_hand():
    ranks = HeadRanks(
        np.array([[0, 1, 0], [9, 9, 9], [9, 9, 9], [1, 0, 0], [2, 0, 0]]), np.ones((5, 3), bool),
        np.array([0, 5]), 10,
    )  # fmt: skip
    answer = AnswerSteps(0, "all", (2, 1), 0)
    assert step_rows(answer).tolist() == [0, 3]
    counts = count_nodes([answer], ranks, PATHS)
    assert dict(counts.accepted) == {(0,): 1, (0, 1): 1, (1,): 1}
    assert counts.by_rank(3, 2) == [[0.5, 0.5], [0, 0.5], [0, 0]]
    wrong = count_nodes([AnswerSteps(0, "all", (3, 1), 0)], ranks, PATHS)
    assert wrong.unexplained == 2  # (0, 1, 0) and rank 2 are no nodes


def test_prediction_from_a_tree_file():
    metadata = {
        "accuracies": [[0.5, 0.2], [0.4, 0.1]], "accepted_shares": [0.5, 0.3, 0.2],
        "tokens_per_step_by_nodes": [1.4, 1.7, 2.0], "expected_tokens_per_step": 2.0,
    }  # fmt: skip
    tree = TokenTree(((0,), (0, 0), (1,)), metadata)
    found = predict(tree, tree.paths)
    assert found.independent == pytest.approx(1 + 0.5 + 0.5 * 0.4 + 0.2)
    assert found.calibrated == 2.0
    assert found.by_depth == pytest.approx((0.7, 0.3))
    # A budget keeps the first nodes; another tree is predicted from accuracies alone.
    assert predict(tree, tree.paths[:2]).calibrated == 1.7
    other = predict(tree, ((0,), (0, 1)))
    assert (other.calibrated, other.by_depth) == (None, None)
    assert other.independent == pytest.approx(1 + 0.5 + 0.05)
    # An older file tells the whole tree's value only.
    old = TokenTree(tree.paths, {"expected_tokens_per_step": 2.1})
    assert predict(old, tree.paths).calibrated == 2.1
    assert predict(old, tree.paths[:2]).calibrated is None
    assert predict(TokenTree(tree.paths), tree.paths).independent is None


def test_categories_take_turns():
    prompts = [Prompt(("x",), c) for c in "aaabb"]
    assert [p.category for p in choose_prompts(prompts, 3)] == ["a", "b", "a"]
    assert len(choose_prompts(prompts, None)) == 5


def test_layout_puts_leaves_side_by_side():
    places = tree_layout(list(PATHS))
    assert {path: depth for path, (_, depth) in places.items()} == {
        (): 0, **{path: len(path) for path in PATHS}
    }  # fmt: skip
    leaves = [places[p][0] for p in ((0, 0, 0), (0, 1), (1,))]
    assert leaves == [0, 1, 2]
    assert places[(0,)][0] == 0.5


def test_tables_and_plots(tmp_path, capsys):
    run, ranks = _random_run(0)
    record = evaluation_record(run, ranks, None, EvalConfig(resamples=20))
    print_evaluation(record)
    text = capsys.readouterr().out
    assert "Predicted and served" in text
    for plot in save_plots(record, tmp_path):
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_trees_chosen_at_every_step_have_no_simulation_to_be_held_against():
    with pytest.raises(ValueError, match="tree is 'dynamic'; expected one tree for all steps"):
        EvalConfig(tree="dynamic")
