"""Hidden states in files, the run log, options from settings files, frequent tokens."""

import argparse
import json
import sys

import numpy as np
import pytest
import tiny_base
import torch

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.training.config import DistillConfig, EvalConfig, TrainConfig
from vllm_medusa.training.config_options import add_config_options, config_from_options
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_shards import store_hidden_states
from vllm_medusa.training.hidden_states import extract_hidden_states
from vllm_medusa.training.joint_config import JointConfig
from vllm_medusa.training.run_log import RunLog
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.training.trainer import MedusaOneTrainer
from vllm_medusa.training.vocab_subset import frequent_tokens, restrict_vocabulary

# -- hidden states in files ---------------------------------------------------------


@pytest.mark.parametrize("shard_rows", [1, 50, 10**6], ids=["one each", "several", "one file"])
def test_files_hold_the_same_rows_as_memory(tmp_path, shard_rows):
    model, answers = tiny_base.make_base(), tiny_base.counting_answers()
    memory = extract_hidden_states(model, answers, 2)
    stored = store_hidden_states(model, answers, 2, tmp_path, "m", shard_rows)
    assert stored.num_rows == memory.num_rows
    assert torch.equal(stored.labels, memory.labels)
    assert (stored.offsets == memory.offsets).all()
    # Batches of other shapes round the same sums differently.
    torch.testing.assert_close(stored.hidden[:], memory.hidden, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([5, memory.num_rows - 1, 0, 5])
    assert torch.equal(stored.hidden[rows], stored.hidden[:][rows])
    batches = zip(stored.batches(64, 0), memory.batches(64, 0), strict=True)
    for (_, left), (_, right) in batches:
        assert torch.equal(left, right)


def test_a_stopped_extraction_goes_on(tmp_path, monkeypatch):
    model, answers = tiny_base.make_base(), tiny_base.counting_answers()
    first = store_hidden_states(model, answers, 2, tmp_path, "m", 50).hidden[:].clone()
    files = sorted(tmp_path.glob("*.bin"))
    assert len(files) > 2
    times = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    again = store_hidden_states(model, answers, 2, tmp_path, "m", 50)
    assert torch.equal(again.hidden[:], first)
    assert all(f.stat().st_mtime_ns == times[f] for f in files if f != files[1])


def test_files_of_other_data_are_refused(tmp_path):
    model, answers = tiny_base.make_base(), tiny_base.counting_answers()
    store_hidden_states(model, answers, 2, tmp_path, "m")
    with pytest.raises(ValueError, match="holds hidden states with model 'm'; expected 'other'"):
        store_hidden_states(model, answers, 2, tmp_path, "other")
    with pytest.raises(ValueError, match="hidden states with rows"):
        store_hidden_states(model, answers.select([0, 1]), 2, tmp_path, "m")


def test_training_from_files_equals_training_from_memory(tmp_path):
    model, answers = tiny_base.make_base(), tiny_base.counting_answers()
    stored = store_hidden_states(model, answers, 2, tmp_path, "m", 50)
    memory = extract_hidden_states(model, answers, 2)
    memory = type(memory)(stored.hidden[:], memory.labels, memory.offsets)
    config = TrainConfig(num_heads=2, num_layers=1, epochs=2, batch_tokens=64, warmup_steps=1)
    weight = model.get_output_embeddings().weight.detach()
    left, right = (MedusaOneTrainer(config, d, weight).train() for d in (stored, memory))
    assert torch.equal(left.weight, right.weight)


def test_data_without_an_answer_is_refused():
    answers = ConversationSet.from_pairs([([1, 2, 3], [])])
    with pytest.raises(ValueError, match="1 conversations hold no answer token"):
        extract_hidden_states(tiny_base.make_base(), answers, 2)


# -- log ----------------------------------------------------------------------------


def test_log_is_cut_where_a_run_resumes(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, loss=1 / step, head_losses=[1.0, 2.0])
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.cut(2)
    assert [row["step"] for row in log.rows()] == [1, 2]
    log.restart()
    assert log.rows() == [] and log.plot() is None
    RunLog(None).write(1, loss=0.0)


def test_log_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    log = RunLog(tmp_path)
    log.write(1, loss=1.0)
    assert log.plot().read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_run_ends_without_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log = RunLog(tmp_path)
    log.write(1, loss=1.0)
    assert log.plot() is None
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_tensorboard_gets_the_same_numbers(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is optional",
    )
    RunLog(tmp_path, tensorboard=True).write(5, loss=0.5, head_losses=[1.0, 2.0])
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("head_losses/2")] == [(5, 2.0)]


# -- options --------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TrainConfig, DistillConfig, EvalConfig, JointConfig])
def test_every_field_is_an_option_and_options_win_over_the_file(tmp_path, config):
    parser = argparse.ArgumentParser()
    add_config_options(parser, config)
    assert config_from_options(config, parser.parse_args([])) == config()
    changed = config(seed=7)
    changed.save(tmp_path / "c.json")
    words = ["--config", str(tmp_path / "c.json")]
    assert config_from_options(config, parser.parse_args(words)) == changed
    assert config_from_options(config, parser.parse_args([*words, "--seed", "0"])) == config()


def test_kinds_of_options():
    parser = argparse.ArgumentParser()
    add_config_options(parser, JointConfig)
    words = ["--no-self-distillation", "--lora-targets", "q_proj", "v_proj", "--medusa-schedule",
             "sine", "--vocab-subset", "9"]  # fmt: skip
    found = config_from_options(JointConfig, parser.parse_args(words))
    assert not found.self_distillation and found.medusa_schedule == "sine"
    assert found.lora_targets == ("q_proj", "v_proj") and found.vocab_subset == 9
    with pytest.raises(SystemExit):
        parser.parse_args(["--medusa-schedule", "steep"])


# -- vocabulary -----------------------------------------------------------------------


def test_frequent_tokens_are_those_of_the_answers():
    pairs = [([9, 9, 9, 9], [3, 5, 5, 2]), ([9], [5, 7, 7, 2])]
    answers = ConversationSet.from_pairs(pairs)
    assert frequent_tokens(answers, 3, 12).tolist() == [2, 5, 7]
    # 3 comes next; then unseen ones, lowest first. The prompt's 9 counts as unseen.
    assert frequent_tokens(answers, 6, 12).tolist() == [0, 1, 2, 3, 5, 7]
    with pytest.raises(ValueError, match=r"count: found 13, expected 1\.\.12"):
        frequent_tokens(answers, 13, 12)


@pytest.mark.parametrize("own", [False, True])
def test_restricted_heads_rank_the_kept_tokens_alike(own):
    from vllm_medusa.heads import MedusaHeads

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 8, generator=generator)
    spec = HeadSpec(2, 1, 8, 20, bias=True, own_lm_head=own, dtype=torch.float32)
    trained = TrainableHeads.from_spec(spec, weight)
    torch.nn.init.normal_(trained.weight, generator=generator)
    whole = trained.to_weights(20, torch.float32)
    ids = torch.tensor([1, 4, 5, 17])
    hidden = torch.randn(6, 8, generator=generator)
    outputs = []
    for weights in (whole, restrict_vocabulary(whole, ids)):
        heads = MedusaHeads.from_weights(weights)
        size = weights.spec.output_size
        outputs.append(heads.top_tokens(hidden, size, lambda x: x @ weight.T))
    for row, head in np.ndindex(6, 2):
        kept = [t for t in outputs[0][row, head].tolist() if t in ids]
        assert outputs[1][row, head].tolist() == kept
    with pytest.raises(ValueError, match="found heads with a vocabulary subset"):
        restrict_vocabulary(restrict_vocabulary(whole, ids), ids)


def test_train_and_restrict_from_the_command_line(tmp_path):
    from vllm_medusa.cli import main

    base, data = tmp_path / "base", tmp_path / "answers.safetensors"
    tiny_base.make_base().save_pretrained(base)
    tiny_base.counting_answers().save(data)
    common = ["--data", str(data), "--output"]
    for number, kind in enumerate((
        ["--lm-head", "low-rank", "--lm-head-rank", "4", "--hidden-states", "disk"],
        ["--sequential", "--vocab-subset", "12"],
    )):  # fmt: skip
        output = tmp_path / str(number)
        words = ["train", "--model", str(base), *common, str(output), "--device", "cpu",
                 "--num-heads", "2", "--num-layers", "1", "--batch-tokens", "64", "--epochs",
                 "1", "--held-out", "8", "--num-nodes", "5", "--max-rank", "4", *kind]  # fmt: skip
        assert main(words) == 0
        assert load_heads(output).format == "M"
        assert json.loads((output / "tree.json").read_text())["paths"]
        assert main(["calibrate", "--model", str(base), "--heads", str(output), "--device", "cpu",
                     "--num-nodes", "5", "--max-rank", "4"]) == 0  # fmt: skip
    words = ["restrict", "--heads", str(tmp_path / "0"), *common, str(tmp_path / "cut"),
             "--count", "10"]  # fmt: skip
    assert main(words) == 0
    assert load_heads(tmp_path / "cut").spec.vocab_subset_size == 10
