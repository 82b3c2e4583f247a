"""Medusa-2: losses against the definition, the teacher, rates, schedules, resuming, export."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_base
import torch
from torch.nn import functional

from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.joint_config import JointConfig
from vllm_medusa.training.joint_export import export_joint
from vllm_medusa.training.joint_loss import chunked_mean, cross_entropy, divergence
from vllm_medusa.training.joint_model import JointModel
from vllm_medusa.training.joint_trainer import JointTrainer
from vllm_medusa.training.loss import IGNORE
from vllm_medusa.training.new_heads import new_heads
from vllm_medusa.training.sequence_batches import SequenceData

HEADS = 2


def _config(**changes):
    settings = {
        "num_heads": HEADS, "num_layers": 1, "head_only_epochs": 1, "joint_epochs": 2,
        "batch_size": 8, "micro_batch_size": 3, "warmup_steps": 2, "learning_rate": 0.002,
        "lora_rank": 2, "loss_chunk_rows": 7, "log_every": 1, "checkpoint_every": 0,
        "dtype": "float32", "max_length": 64, **changes,
    }  # fmt: skip
    return JointConfig(**settings)


def _model(config, dtype=torch.float32):
    base = tiny_base.make_base().to(dtype)
    weight = base.get_output_embeddings().weight.detach()
    heads = new_heads(config, weight, tiny_base.counting_answers(), "cpu").to(dtype)
    return JointModel(base, heads, config)


def _data():
    return SequenceData(tiny_base.counting_answers(), HEADS, 64)


def _disturb_adapter(model):
    """LoRA's B starts at zero; give it values, so that switching it off makes a difference."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.base.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 4


# -- batches ------------------------------------------------------------------------


def test_labels_shift_right_and_padding_that_looks_like_the_end_is_no_label():
    pairs = [([5, 6], [7, 8, tiny_base.END]), ([5], [9, tiny_base.END])]
    data = SequenceData(ConversationSet.from_pairs(pairs), 2, 64)
    batch = data.batch(np.array([0, 1]))
    end = tiny_base.END
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, end], [5, 9, end, 0, 0]]
    # Head k at t learns t + k + 1; the prompt asks for nothing; the end token is learned.
    assert batch.rows.tolist() == [1, 2, 3, 5, 6]
    assert batch.labels.tolist() == [
        [7, 8, end], [8, end, IGNORE], [end, IGNORE, IGNORE],
        [9, end, IGNORE], [end, IGNORE, IGNORE],
    ]  # fmt: skip


def test_padding_changes_no_loss():
    model = _model(_config(self_distillation=False))
    data = SequenceData(tiny_base.counting_answers(), HEADS, 64)
    lengths = [len(data.conversations.tokens(i)) for i in range(len(data))]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    model.eval()

    def losses(batch, rows=slice(None)):
        with torch.no_grad():
            return model(batch.input_ids, batch.rows[rows], batch.labels[rows], True)

    alone = data.batch(np.array([short]))
    padded = data.batch(np.array([short, long]))
    mine = slice(0, len(alone.rows))
    # Sums over rows of another batch shape, in float32.
    torch.testing.assert_close(losses(alone).total, losses(padded, mine).total)


def test_unusable_conversations_are_counted_or_refused():
    pairs = [([1] * 10, [3, 2]), ([1], [3] * 30), ([1, 2], [])]
    data = SequenceData(ConversationSet.from_pairs(pairs), 1, 10)
    assert len(data) == 1
    assert data.counts == {"cut": 2, "no answer token left": 2}
    assert data.batch(data.indices).input_ids.shape == (1, 10)
    with pytest.raises(ValueError, match="none of 1 conversations has an answer token"):
        SequenceData(ConversationSet.from_pairs([([1, 2], [])]), 1, 10)
    with pytest.raises(ValueError, match="batch_size is 9; expected at most the 1 usable"):
        data.steps_per_epoch(9)


def test_every_epoch_shows_every_conversation_in_a_new_order():
    data = _data()
    epochs = [
        np.concatenate([data.step_indices(e * 5 + b, 8, seed=0) for b in range(5)])
        for e in range(2)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    assert list(epochs[0]) != list(epochs[1])


# -- loss ------------------------------------------------------------------------------


def _logits(model, batch):
    """LM and head logits of every row by the definition, in the model's present state."""
    hidden = model.base.model(input_ids=batch.input_ids).last_hidden_state
    rows = hidden.flatten(0, 1)[batch.rows]
    weight = model.base.lm_head.weight
    heads = []
    for k in range(HEADS):
        update = rows @ model.heads.weight[0, k].T + model.heads.bias[0, k]
        heads.append((rows + update * torch.sigmoid(update)) @ weight.T)
    return rows @ weight.T, heads


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("rank", [2, 0])
def test_joint_loss_and_its_gradient_equal_the_definition(distil, rank):
    if distil and rank == 0:
        with pytest.raises(ValueError, match="the teacher is the model without its adapter"):
            _config(self_distillation=True, lora_rank=0)
        return
    config = _config(self_distillation=distil, lora_rank=rank, lora_dropout=0.0)
    model = _model(config, torch.float64)
    _disturb_adapter(model)
    batch = _data().batch(np.arange(4))
    found = model(batch.input_ids, batch.rows, batch.labels, True, 0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(found.total, trained, allow_unused=True)

    lm_logits, head_logits = _logits(model, batch)
    if distil:
        with model.adapter[0].disable_adapter(), torch.no_grad():
            teacher = torch.softmax(_logits(model, batch)[0], -1)
        lm = (teacher * (teacher.log() - torch.log_softmax(lm_logits, -1))).sum(-1).mean()
    else:
        lm = functional.cross_entropy(lm_logits, batch.labels[:, 0])
    # A head's gradient reaches the backbone, but not the lm_head that it only borrows.
    weight = model.base.lm_head.weight
    borrowed = weight.detach()
    hidden = model.base.model(input_ids=batch.input_ids).last_hidden_state
    rows = hidden.flatten(0, 1)[batch.rows]
    total = lm
    for k in range(HEADS):
        update = rows @ model.heads.weight[0, k].T + model.heads.bias[0, k]
        logits = (rows + update * torch.sigmoid(update)) @ borrowed.T
        ce = functional.cross_entropy(logits, batch.labels[:, k + 1], ignore_index=IGNORE)
        torch.testing.assert_close(found.heads[k], ce.detach())
        torch.testing.assert_close(logits, head_logits[k])
        total = total + 0.3 * 0.8 ** (k + 1) * ce
    torch.testing.assert_close(found.language_model, lm.detach())
    torch.testing.assert_close(found.total, total)
    wanted = torch.autograd.grad(total, trained, allow_unused=True)
    for left, right in zip(got, wanted, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            # Llama's norms compute in float32 even in a float64 model.
            torch.testing.assert_close(left, right, atol=1e-7, rtol=1e-4)


def test_head_stage_leaves_the_backbone_alone_and_counts_the_heads_whole():
    model = _model(_config())
    batch = _data().batch(np.arange(4))
    loss = model(batch.input_ids, batch.rows, batch.labels, False, 1.0)
    loss.total.backward()
    assert all(p.grad is None for p in model.backbone_parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
    expected = sum(0.8**k * loss.heads[k - 1] for k in (1, 2))
    torch.testing.assert_close(loss.total, expected)
    assert loss.language_model == 0


def test_teacher_is_the_untouched_base():
    untouched = tiny_base.make_base()
    model = _model(_config(lora_dropout=0.5)).train()
    _disturb_adapter(model)
    batch = _data().batch(np.arange(4))
    with torch.no_grad():
        expected = untouched.model(input_ids=batch.input_ids).last_hidden_state
        with model.without_adapter():
            teacher = model._hidden(batch.input_ids, batch.rows)
        student = model._hidden(batch.input_ids, batch.rows)
    assert torch.equal(teacher, expected.flatten(0, 1)[batch.rows])
    assert not torch.allclose(student, teacher, atol=1e-3)
    # Switched off for the teacher only: dropout and adapter are on again.
    assert model.adapter[0].training
    layers = [m for m in model.base.modules() if hasattr(m, "lora_A")]
    assert layers and not any(layer.disable_adapters for layer in layers)


def test_divergence_of_equal_models_is_zero_and_ignored_rows_do_not_count():
    logits = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([1, 2, IGNORE, 3, 4])
    assert divergence(logits, logits.clone(), labels).abs() < 1e-12
    other = logits.clone()
    other[2] = 100 * torch.randn(7, dtype=torch.float64)
    assert divergence(logits, other, labels).abs() < 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 5, 99])
def test_chunks_change_nothing(chunk):
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, IGNORE, 3, 6, 2])
    found = chunked_mean(lambda h, y: cross_entropy(h @ weight.T, y), (hidden,), labels, chunk)
    expected = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for left, right in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(left, right)


# -- rates and schedules --------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [{}, {"lm_head": "low-rank", "lm_head_rank": 3}, {"sequential": True}]
)
def test_every_head_parameter_learns_faster(kind):
    model = _model(_config(learning_rate=0.01, **kind))
    groups = {group["name"]: group for group in model.parameter_groups()}
    heads = {id(p) for p in groups["heads"]["params"]}
    names = {n for n, p in model.heads.named_parameters() if id(p) in heads}
    assert {"weight", "bias"} <= names == set(dict(model.heads.named_parameters()))
    assert groups["heads"]["base_lr"] == pytest.approx(0.04)
    assert groups["backbone"]["base_lr"] == 0.01
    body = {id(p) for p in groups["backbone"]["params"]}
    assert not body & heads
    lora = [n for n, p in model.base.named_parameters() if id(p) in body]
    assert lora and all("lora_" in name for name in lora)
    assert not any("lm_head" in name for name in lora)


def test_whole_backbone_is_trained_without_an_adapter():
    model = _model(_config(lora_rank=0, self_distillation=False))
    assert len(model.backbone_parameters()) == len(list(model.base.parameters()))


def test_schedules():
    config = _config(warmup_steps=4, medusa_weight=0.2)
    assert [config.rate_factor(s, 100) for s in (0, 3)] == pytest.approx(
        [0.25, 0.5 * (1 + math.cos(0.03 * math.pi))]
    )
    assert config.rate_factor(100, 100) == pytest.approx(0)
    assert config.medusa_factor(7, 100) == 0.2
    sine = dataclasses.replace(config, medusa_schedule="sine")
    assert sine.medusa_factor(50, 100) == pytest.approx(0.2 * math.sin(math.pi / 4))
    assert sine.medusa_factor(0, 100) == 0
    linear = dataclasses.replace(config, medusa_schedule="linear")
    assert linear.medusa_factor(25, 100) == pytest.approx(0.05)
    assert config.head_weights == pytest.approx((0.8, 0.64))


def test_settings_are_read_back_and_checked(tmp_path):
    config = _config(lora_targets=("q_proj",), tensorboard=True)
    config.save(tmp_path / "c.json")
    assert JointConfig.load(tmp_path / "c.json") == config
    with pytest.raises(ValueError, match="no lm_head while the heads share it"):
        _config(lora_targets=("lm_head",))
    with pytest.raises(ValueError, match="quantised weights cannot be trained"):
        _config(lora_rank=0, self_distillation=False, quantise="4bit")
    with pytest.raises(ValueError, match=r"lora_targets names .*'c_attn'"):
        _model(_config(lora_targets=("c_attn",)))


# -- runs -----------------------------------------------------------------------------


def _weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    config = _config(lora_dropout=0.2)
    whole = JointTrainer(config, _model(config), _data(), tmp_path / "whole", cpu=True)
    expected = _weights(whole.train())
    assert whole.total_steps == 15 and whole.head_only_steps == 5
    # Stopped within the first stage, then within the second.
    for stop in (3, 9, None):
        run = JointTrainer(config, _model(config), _data(), tmp_path / "parts", cpu=True)
        if stop != 3:
            run.load_state()
        found = _weights(run.train(until_step=stop))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 15
    assert (tmp_path / "whole" / "losses.png").exists()
    # A state holds what was trained, not the frozen base.
    kept = torch.load(tmp_path / "whole" / "state" / "trained.pt", weights_only=True)
    assert set(kept) == set(expected)


def test_a_lost_log_line_and_other_data_on_resuming(tmp_path):
    config = _config()
    run = JointTrainer(config, _model(config), _data(), tmp_path, cpu=True)
    run.train(until_step=2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    run = JointTrainer(config, _model(config), _data(), tmp_path, cpu=True)
    run.load_state()
    assert [row["step"] for row in run.log.rows()] == [1, 2]
    other = SequenceData(tiny_base.counting_answers(30), HEADS, 64)
    run = JointTrainer(config, _model(config), other, tmp_path, cpu=True)
    with pytest.raises(ValueError, match="had 40 conversations, the data holds 30"):
        run.load_state()
    with pytest.raises(ValueError, match="holds no state"):
        JointTrainer(config, _model(config), _data(), tmp_path / "new", cpu=True).load_state()


def test_both_losses_fall_and_the_teacher_stays_near(tmp_path):
    config = _config(head_only_epochs=4, joint_epochs=8, learning_rate=0.01)
    trainer = JointTrainer(config, _model(config), _data(), tmp_path, cpu=True)
    trainer.train()
    rows = trainer.log.rows()
    heads = [row for row in rows if row["stage"] == "heads"]
    joint = [row for row in rows if row["stage"] == "joint"]
    assert all(row["language_model_loss"] == 0 for row in heads)
    assert sum(heads[-1]["head_losses"]) < sum(heads[0]["head_losses"])
    assert sum(joint[-1]["head_losses"]) < sum(heads[-1]["head_losses"])
    # The divergence starts at nothing, and training keeps it small.
    assert abs(joint[0]["language_model_loss"]) < 1e-6
    assert 0 < joint[-1]["language_model_loss"] < 0.3


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole"])
def test_export_holds_base_adapter_and_heads_that_fit(tmp_path, whole):
    from transformers import AutoModelForCausalLM

    from vllm_medusa.checkpoint import load_heads

    config = _config(self_distillation=not whole, lora_rank=0 if whole else 2)
    model = JointTrainer(config, _model(config), _data(), tmp_path, cpu=True).train().eval()
    batch = _data().batch(np.arange(4))
    with torch.no_grad():
        expected = model._hidden(batch.input_ids, batch.rows)
    export_joint(model, tmp_path, "tiny", str(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-medusa2", dtype=torch.float32)
    with torch.no_grad():
        found = base.model(input_ids=batch.input_ids).last_hidden_state.flatten(0, 1)[batch.rows]
    # W x + B A x against (W + B A) x.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    weights = load_heads(tmp_path)
    assert torch.equal(weights.weight, model.heads.weight.detach().bfloat16())
    assert weights.metadata["base_model_name_or_path"] == "tiny-medusa2"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() != whole


def test_command_line_runs_resumes_and_starts_from_heads(tmp_path):
    from vllm_medusa.cli import main

    base = tmp_path / "base"
    tiny_base.make_base().save_pretrained(base)
    tiny_base.counting_answers().save(tmp_path / "answers.safetensors")
    data = tmp_path / "answers.safetensors"
    common = ["train-joint", "--model", str(base), "--data", str(data), "--device", "cpu",
              "--held-out", "8", "--num-nodes", "5", "--max-rank", "4"]  # fmt: skip
    settings = ["--num-heads", "2", "--batch-size", "8", "--head-only-epochs", "1",
                "--joint-epochs", "1", "--lora-rank", "2", "--dtype", "float32",
                "--log-every", "1", "--warmup-steps", "1"]  # fmt: skip
    assert main([*common, "--output", str(tmp_path / "out"), *settings]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tree.json", "training.json", "train_config.json", "base-medusa2",
            "adapter", "held_out.safetensors"} <= written  # fmt: skip
    assert main([*common, "--output", str(tmp_path / "out"), "--resume"]) == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["steps"] == 8 and record["processes"] == 1
    status = main([*common, "--output", str(tmp_path / "two"), "--heads", str(tmp_path / "out"),
                   "--config", str(tmp_path / "out" / "train_config.json"),
                   "--head-only-epochs", "0"])  # fmt: skip
    assert status == 0
    kept = JointConfig.load(tmp_path / "two" / "train_config.json")
    assert (kept.head_only_epochs, kept.num_heads, kept.lora_rank) == (0, 2, 2)
    status = main([*common, "--output", str(tmp_path / "three"), "--heads", str(tmp_path / "out"),
                   *settings[2:], "--num-heads", "3"])  # fmt: skip
    assert status == 2


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """DDP over gloo: the same batches, so the same gradients up to the order of sums."""
    base = tmp_path / "base"
    tiny_base.make_base().save_pretrained(base)
    tiny_base.counting_answers().save(tmp_path / "answers.safetensors")
    weights = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                  "--master_port", str(_free_port())]  # fmt: skip
        command = [*launch, "-m", "vllm_medusa.cli", "train-joint", "--model", str(base),
                   "--data", str(tmp_path / "answers.safetensors"), "--output", str(output),
                   "--device", "cpu", "--held-out", "8", "--num-nodes", "5", "--num-heads", "2",
                   "--batch-size", "8", "--micro-batch-size", "1", "--lora-rank", "2",
                   "--lora-dropout", "0", "--dtype", "float32", "--head-only-epochs", "1",
                   "--joint-epochs", "1", "--warmup-steps", "1"]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(torch.load(output / "state" / "trained.pt", weights_only=True))
        assert json.loads((output / "training.json").read_text())["processes"] == processes
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's own size, which magnifies rounding of tiny gradients.
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-3, rtol=0)
