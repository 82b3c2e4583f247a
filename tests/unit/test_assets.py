"""Heads that the package ships: readable, calibrated, with a record of how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.tree import TokenTree

ASSETS = Path(__file__).parents[2] / "vllm_medusa" / "assets"
SEQUENTIAL = {"smollm2-135m-instruct": False, "smollm2-135m-instruct-sequential": True}


def test_nothing_else_is_shipped():
    assert {path.name for path in ASSETS.iterdir()} == set(SEQUENTIAL)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_heads_fit_their_model_and_their_tree(name):
    heads = load_heads(str(ASSETS / name), hidden_size=576, vocab_size=49152)
    assert heads.spec.sequential is SEQUENTIAL[name]
    tree = TokenTree.load(ASSETS / name / "tree.json")
    tree.validate(heads.spec.num_heads)
    assert tree.num_nodes == 63 and len(tree.metadata["frequencies"]) == 63
    record = json.loads((ASSETS / name / "training.json").read_text())
    assert record["commands"] and record["mt_bench"]["tokens_per_step"]["63"] > 2.3
