"""Acceptance that is drawn for speed benchmarks: its profile, and that it keeps the promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_medusa.config import MedusaOptions
from vllm_medusa.runner import TreeRunnerMixin
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.verification_step import VerificationStep
from vllm_medusa.verifier import TreeVerifier

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


pytestmark = pytest.mark.usefixtures("benchmarks")


def test_profile_is_the_papers():
    from synthetic_profile import ACCURACIES, raised, synthetic_tree

    published = TokenTree.preset("vicuna_7b_stage2")
    assert TokenTree.best_first(ACCURACIES, 63).paths == published.paths
    tree = synthetic_tree(3.47, num_heads=5)
    assert tree.num_rows == 64 and tree.max_depth == 4
    assert tree.metadata["expected_tokens_per_step"] == pytest.approx(3.47, abs=1e-9)
    assert 1 + sum(tree.metadata["frequencies"]) == pytest.approx(3.47, abs=1e-9)
    accuracies = tree.metadata["accuracies"]
    assert tree.expected_tokens(accuracies) == pytest.approx(3.47, abs=1e-9)
    assert len(set(tree.paths) & set(published.paths)) == 59
    assert raised(1.0, 4)[3] == pytest.approx(list(ACCURACIES[3]))


def test_tree_file_is_a_calibrated_one(tmp_path):
    from synthetic_profile import write_tree

    tree = TokenTree.load(write_tree(tmp_path / "a" / "tree.json", 3.0, num_heads=3, num_nodes=20))
    assert tree.num_nodes == 20 and tree.max_depth <= 3
    frequencies = tree.metadata["frequencies"][:20]
    assert frequencies == sorted(frequencies, reverse=True)


@pytest.mark.parametrize(("promise", "heads"), [(5.0, 4), (1.2, 4), (3.47, 2)])
def test_impossible_promises_are_refused(promise, heads):
    from synthetic_profile import synthetic_tree

    with pytest.raises(ValueError, match=rf"{promise:g} tokens per step: {heads} heads of this"):
        synthetic_tree(promise, heads)


def test_children_more_often_right_than_their_parent_are_refused():
    from synthetic_children import child_ranges

    with pytest.raises(ValueError, match=r"children of row 1 that are right in 1\.2000"):
        child_ranges(TokenTree.from_paths([[0], [0, 0]]), (0.5, 0.6))


def made_draws(tree: TokenTree, frequencies: tuple, requests: int):
    """Draws of a runner that has nothing else."""
    from synthetic_draws import SyntheticDraws

    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**62), 2**62, (requests,), generator=generator)
    runner = SimpleNamespace(
        speculative_config=SimpleNamespace(
            dynamic_tree=False, acceptance="exact", node_frequencies=frequencies
        ),
        tree_batch=TreeBatch(tree, requests, torch.device("cpu")),
        sampler=SimpleNamespace(sampling_states=SimpleNamespace(seeds=SimpleNamespace(gpu=seeds))),
    )
    return SyntheticDraws(runner)


def accepted_lengths(tree: TokenTree, frequencies: tuple, nodes: int, steps: int) -> torch.Tensor:
    """[steps * requests] tokens of steps of `nodes` nodes, each behind the one before."""
    requests, rows = 64, nodes + 1
    draws = made_draws(tree, frequencies, requests)
    slots, cu_rows = torch.arange(requests), torch.arange(0, requests * rows + 1, rows).int()
    parents, depths = tree.parents[:rows], torch.tensor(tree.depths[:rows])
    generator = torch.Generator().manual_seed(2)
    roots, lengths = torch.full((requests,), 100), []
    for _ in range(steps):
        drafts = torch.randint(0, 50, (requests * rows,), generator=generator).int()
        drawn = torch.randint(0, 50, (requests * rows,), generator=generator)
        positions = (roots[:, None] + depths).flatten()
        tokens = draws(drawn, drafts, positions, cu_rows, slots).view(requests, rows)
        assert torch.equal(tokens[:, 0], drafts.view(requests, rows)[:, 0])
        drawn, stands = drawn.view(requests, rows), torch.ones(requests, rows, dtype=torch.bool)
        for row, parent in enumerate(parents[1:], start=1):
            # What the walk does: one child at most has a token that was drawn at its parent.
            stands[:, row] = stands[:, parent] & (drawn[:, parent] == tokens[:, row])
        assert (torch.bincount(depths, stands.sum(0)) <= requests).all()
        lengths.append(stands.sum(1))
        roots = roots + stands.sum(1)
    return torch.cat(lengths).double()


@pytest.mark.parametrize("nodes", [63, 15, 1])
def test_steps_yield_what_the_tree_promises(nodes):
    """All widths, whatever the model drew: within 4 standard errors of 25,600 steps."""
    from synthetic_profile import synthetic_tree

    tree = synthetic_tree(3.47, num_heads=4)
    frequencies = tuple(tree.metadata["frequencies"])
    lengths = accepted_lengths(tree, frequencies, nodes, steps=400)
    error = lengths.std() / len(lengths) ** 0.5
    assert error < 0.012
    assert abs(lengths.mean() - (1 + sum(frequencies[:nodes]))) < 4 * error


def test_steps_are_independent():
    """What a step accepts tells nothing of the next one of its request."""
    tree = TokenTree.from_paths([[0], [1]])
    lengths = accepted_lengths(tree, (0.4, 0.2), 2, steps=400).view(400, 64) - 1
    both = (lengths[:-1] * lengths[1:]).mean()
    assert abs(both - 0.36) < 4 * (0.36 * 0.64 / lengths.numel()) ** 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dynamic_tree": True}, 'leave "tree": "dynamic" out'),
        ({"acceptance": "typical"}, "leave acceptance out"),
        ({"node_frequencies": ()}, 'add "adaptive": true and a calibrated tree'),
    ],
)
def test_what_it_cannot_be_combined_with(changed, message):
    from synthetic_draws import SyntheticDraws

    config = {"dynamic_tree": False, "acceptance": "exact", "node_frequencies": (0.5,)} | changed
    with pytest.raises(ValueError, match=f"synthetic acceptance .*{message}"):
        SyntheticDraws(SimpleNamespace(speculative_config=SimpleNamespace(**config)))


def test_users_cannot_ask_for_it():
    with pytest.raises(ValueError, match="key 'synthetic_acceptance' has no meaning for Medusa"):
        MedusaOptions.from_speculative_config({"model": "m", "synthetic-acceptance": 3.47})
    assert TreeRunnerMixin.verifier_class is TreeVerifier
    assert TreeRunnerMixin.step_class is VerificationStep
    for path in (BENCHMARKS.parent / "vllm_medusa").rglob("*.py"):
        assert "synthetic_draws" not in path.read_text(), path


def test_records_and_tables_say_that_it_is_synthetic(tmp_path, monkeypatch):
    import bench_serving
    import report

    monkeypatch.setattr(report, "ROOT", tmp_path)
    arguments = ["x", "--model", "M", "--heads", "H", "--out", str(tmp_path / "r.json")]
    arguments += ["--synthetic-acceptance", "3.47"]
    monkeypatch.setattr(sys, "argv", arguments)
    document = bench_serving.document(bench_serving.parse_args(), {}, {})
    assert document["synthetic_acceptance"] == 3.47
    values = {"median": 2.0, "min": 1.0, "max": 3.0}
    found = {"tokens_per_step": 3.5, "accepted_by_depth": [0.9], "tokens_per_step_by_category": {}}
    result = {"concurrency": 1, "temperature": 0.0, "num_questions": 4, "agreement": None,
              "acceptance": found, "speedup": values, "plain_tokens_per_s": values,
              "medusa_tokens_per_s": values}  # fmt: skip
    made = {"command": ["bench_serving.py"], "gpus": ["a GPU"], "git_sha": "abc"}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document | {"results": [result], "provenance": made}))
    text = report.serving_section(path)
    assert text.startswith("**SYNTHETIC acceptance, M on a GPU**")
    assert "2 turn(s), closed loop, at most 256 tokens" in text
    assert "(3.47 tokens per step with 63 nodes by `benchmarks/synthetic_profile.py`)" in text
    monkeypatch.setattr(sys, "argv", [*arguments, "--tree", "T"])
    with pytest.raises(SystemExit):
        bench_serving.parse_args()
