"""Exported checkpoints load through the product's strict reader and mean the same."""

import json

import numpy as np
import pytest
import torch

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.training.calibrate import HeadRanks, search_tree
from vllm_medusa.training.export import export_heads, export_tree
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.tree import TokenTree

SIZE = 16
HEAD_BYTES = 2 * (SIZE * SIZE + SIZE) * 2  # 2 layers in bf16


def _heads() -> TrainableHeads:
    heads = TrainableHeads(4, 2, SIZE)
    generator = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = values.bfloat16().float()
    return heads


@pytest.mark.parametrize(
    ("limit", "files"),
    [
        pytest.param(4 * HEAD_BYTES, 1, id="fits-one-file"),
        pytest.param(4 * HEAD_BYTES - 1, 2, id="one-byte-too-large"),
        pytest.param(HEAD_BYTES, 4, id="one-head-a-file"),
        pytest.param(1, 4, id="a-head-is-never-cut"),
    ],
)
def test_reader_gets_back_what_was_trained(tmp_path, limit, files):
    heads = _heads()
    assert len(export_heads(heads, tmp_path, 99, "base", limit)) == files
    weights = load_heads(tmp_path)
    assert weights.format == "C2"
    assert weights.spec.vocab_size == 99
    again = TrainableHeads.from_weights(weights)
    assert torch.equal(again.weight, heads.weight)
    assert torch.equal(again.bias, heads.bias)


def test_a_second_export_leaves_no_shard_of_the_first(tmp_path):
    export_heads(_heads(), tmp_path, 99, None, HEAD_BYTES)
    export_heads(_heads(), tmp_path, 99)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "medusa_lm_head.safetensors"]


def test_served_heads_compute_what_was_trained(tmp_path):
    heads = _heads()
    export_heads(heads, tmp_path, 99)
    hidden = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))
    served = MedusaHeads.from_weights(load_heads(tmp_path, dtype=torch.float32))
    # Two orders of the same float32 sums; values reach about 40.
    torch.testing.assert_close(served.forward_hidden(hidden), heads(hidden), atol=1e-4, rtol=1e-5)


def test_tree_file_reads_back_in_order(tmp_path):
    rng = np.random.default_rng(0)
    ranks = HeadRanks(rng.integers(-1, 3, (200, 3)), np.ones((200, 3), bool),
                      np.array([0, 100, 200]), 3)  # fmt: skip
    tree = search_tree(ranks, 20)
    written = export_tree(tree, ranks, tmp_path, "a test")
    assert TokenTree.load(tmp_path / "tree.json").paths == written.paths == tree.paths
    content = json.loads((tmp_path / "tree.json").read_text())
    assert content["source"] == "a test"
    assert content["expected_tokens_per_step"] == round(tree.count.tokens_per_step, 4)
    assert len(content["frequencies"]) == 20
