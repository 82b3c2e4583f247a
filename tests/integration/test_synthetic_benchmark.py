"""Drawn acceptance in engines: launch by launch and as the verification graphs go."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import traffic

pytestmark = pytest.mark.vllm

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
HERE = str(Path(__file__).parent)
NUM_HEADS, NODES, TOKENS = 3, 20, 160
ENGINE = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "seed": 0}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A tree file that promises 3 tokens a step with 63 nodes."""
    sys.path.insert(0, BENCHMARKS)
    try:
        from synthetic_profile import write_tree
    finally:
        sys.path.remove(BENCHMARKS)
        sys.modules.pop("synthetic_profile", None)
    return write_tree(tmp_path_factory.mktemp("profile") / "tree.json", 3.0, NUM_HEADS)


@pytest.mark.parametrize(
    ("nodes", "whole_steps", "top_p"),
    [(NODES, False, 0.8), (NODES, True, 1.0), (3, True, 1.0), (NODES, True, 0.8)],
    ids=["launch by launch", "whole steps", "cut tree", "behind the draw"],
)
def test_engine_accepts_what_the_tree_promises(run_job, tiny, tree, nodes, whole_steps, top_p):
    """Within 4 standard errors of about 900 steps or more; a step accepts at most 3."""
    count = 16
    config = {
        "method": "medusa", "model": tiny["heads"], "tree": str(tree), "adaptive": True,
        "num_speculative_tokens": NODES,
        "num_speculative_tokens_per_batch_size": [[1, 99, nodes]],
    }  # fmt: skip
    # One more request than there are: the largest batch decodes plainly.
    engine = ENGINE | {
        "model": tiny["model"], "max_num_seqs": count + 1, "speculative_config": config,
        "worker_extension_cls": "synthetic_acceptance.SyntheticAcceptance",
    }  # fmt: skip
    # Greedy, seeded alike, and with or without a filter, which leaves the draw out of the graphs.
    kinds = (
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 0.9, "top_p": top_p},
    )
    sampling = [{"max_tokens": TOKENS, "ignore_eos": True, **kinds[i % 3]} for i in range(count)]
    batches = [{"prompts": traffic.prompts(count, seed=3), "sampling": sampling}]
    paths = [HERE, BENCHMARKS, *filter(None, [os.environ.get("PYTHONPATH")])]
    result = run_job(
        engine, batches, env={"PYTHONPATH": os.pathsep.join(paths)}, whole_steps=whole_steps
    )
    assert all(len(row["token_ids"][0]) == TOKENS for row in result["batches"][0])
    assert (result["whole_steps"] > 50) == whole_steps
    counters = result["counters"]
    steps = counters["vllm:spec_decode_num_drafts"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"] / steps
    promised = sum(json.loads(tree.read_text())["frequencies"][:nodes])
    # Of a number between 0 and 3 with this mean.
    deviation = (promised * (NUM_HEADS - promised)) ** 0.5
    assert steps > 0.9 * count * TOKENS / (1 + promised) - count
    assert abs(accepted - promised) < 4 * deviation / steps**0.5
