"""train and calibrate from files to a loadable checkpoint, on a tiny base model."""

import argparse
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.training.cli import add_calibrate_parser, add_distill_parser, add_train_parser
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.tree import TokenTree

RUN_OPTIONS = ["--num-heads", "2", "--num-layers", "1", "--batch-tokens", "64", "--epochs", "2",
               "--held-out", "8", "--num-nodes", "5", "--max-rank", "4"]  # fmt: skip


def _run(*words):
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for add in (add_distill_parser, add_train_parser, add_calibrate_parser):
        add(subparsers)
    arguments = parser.parse_args([str(word) for word in words])
    arguments.run(arguments)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny random Llama and answers that count upwards."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    starts = np.random.default_rng(0).integers(0, 20, 40)
    pairs = [([start], list(range(start + 1, start + 16))) for start in starts]
    ConversationSet.from_pairs(pairs).save(folder / "answers.safetensors")
    return folder


def test_train_writes_a_checkpoint_that_calibrate_reads(base, tmp_path, capsys):
    _run("train", "--model", base, "--data", base / "answers.safetensors", "--output", tmp_path,
         "--device", "cpu", *RUN_OPTIONS)  # fmt: skip
    spec = load_heads(tmp_path).spec
    assert (spec.num_heads, spec.num_layers, spec.hidden_size) == (2, 1, 16)
    tree = TokenTree.load(tmp_path / "tree.json")
    assert 1 <= tree.num_nodes <= 5
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["config"]["num_heads"] == 2
    assert record["answer_tokens"] + 15 * len(
        ConversationSet.load(tmp_path / "held_out.safetensors")
    ) == 40 * 15  # fmt: skip
    capsys.readouterr()
    _run("calibrate", "--model", base, "--heads", tmp_path, "--device", "cpu", "--num-nodes", "5",
         "--max-rank", "4")  # fmt: skip
    assert "head 2: top-1" in capsys.readouterr().out
    assert TokenTree.load(tmp_path / "tree.json").num_nodes >= 1


def test_resume_keeps_the_folders_settings(base, tmp_path):
    common = ["train", "--model", base, "--data", base / "answers.safetensors", "--output",
              tmp_path, "--device", "cpu"]  # fmt: skip
    _run(*common, *RUN_OPTIONS)
    kept = TrainConfig.load(tmp_path / "train_config.json")
    weights = load_heads(tmp_path).weight
    _run(*common, "--resume", "--held-out", "8", "--num-nodes", "5")
    assert TrainConfig.load(tmp_path / "train_config.json") == kept
    assert torch.equal(load_heads(tmp_path).weight, weights)
    with pytest.raises(ValueError, match=r"--num-layers is 4, but the run in .* began with 1"):
        _run(*common, "--resume", "--num-layers", "4")
