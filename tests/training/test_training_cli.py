"""train and calibrate from files to a loadable checkpoint, on a tiny base model."""

import argparse
import json

import numpy as np
import pytest
import tiny_base
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.training.base_model import compile_layers, has_compiled_layers, run_base
from vllm_medusa.training.cli import (
    add_calibrate_parser,
    add_distill_parser,
    add_train_parser,
    read_answers,
)
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import extract_hidden_states
from vllm_medusa.training.joint_config import JointConfig
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


def test_conversations_that_the_model_cannot_read_are_counted(tmp_path, capsys):
    LlamaConfig(max_position_embeddings=5).save_pretrained(tmp_path)
    path = tmp_path / "a.safetensors"
    ConversationSet.from_pairs([([1], [2] * 4), ([1], [2] * 5), ([1, 1], [3])]).save(path)
    answers = read_answers([path], str(tmp_path))
    assert "1 conversations left out (longer than the model's 5 positions)" in (
        capsys.readouterr().out
    )
    assert [answers.tokens(i).tolist() for i in range(len(answers))] == [[1, 2, 2, 2, 2], [1, 1, 3]]
    ConversationSet.from_pairs([([1], [2] * 9)]).save(path)
    with pytest.raises(ValueError, match="all 1 conversations are longer than 5 tokens"):
        read_answers([path], str(tmp_path))


@pytest.mark.slow
def test_compiled_layers_feed_the_heads_the_same():
    answers = tiny_base.counting_answers()
    model = tiny_base.make_base(num_hidden_layers=5)
    plain = extract_hidden_states(model, answers, 2, 64)
    counters.clear()
    compiled = extract_hidden_states(compile_layers(model), answers, 2, 64)
    # Not one a layer or shape; another where a batch holds one conversation.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    torch.testing.assert_close(compiled.hidden, plain.hidden)


@pytest.mark.slow
def test_batches_of_one_shape_compile_one_graph_of_that_shape():
    # The compiler remembers which sizes differed before.
    torch.compiler.reset()
    ids = torch.arange(12).view(2, 6)
    model = tiny_base.make_base(num_hidden_layers=5)
    plain = run_base(model, ids)
    compile_layers(model, dynamic=None)
    counters.clear()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run_base(model, ids), plain)
        assert counters["stats"]["unique_graphs"] == 1
        for length in (5, 4, 3):
            torch.testing.assert_close(run_base(model, ids[:, :length]), plain[:, :length])
    # Shapes that differ share one more.
    assert counters["stats"]["unique_graphs"] == 2


def test_where_compiling_fails_the_layers_run_uncompiled(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no C compiler\nat all")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    ids = torch.arange(12).view(2, 6)
    model = tiny_base.make_base()
    plain = run_base(model, ids)
    assert has_compiled_layers(compile_layers(model))
    with torch.no_grad():
        assert torch.equal(run_base(model, ids), plain)
    said = capsys.readouterr().out
    assert said.startswith("compile_base: going on without, since compiling failed: ")
    assert "no C compiler" in said and said.count("\n") == 1
    assert not has_compiled_layers(model)


def test_other_errors_of_a_compiled_base_are_not_swallowed():
    model = compile_layers(tiny_base.make_base())
    with pytest.raises((IndexError, RuntimeError), match="index"):
        run_base(model, torch.full((1, 3), tiny_base.VOCAB))
    assert has_compiled_layers(model)


def test_a_model_without_named_layers_is_not_compiled():
    with pytest.raises(ValueError, match="compile_base: Linear does not name the class"):
        compile_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="compile_base is True; expected false with a joint"):
        JointConfig(compile_base=True)
    assert JointConfig(compile_base=True, joint_epochs=0).compile_base
