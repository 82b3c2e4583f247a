"""Trainer: independent layers, resuming, learning, saved settings."""

import numpy as np
import pytest
import torch

from vllm_medusa.training.config import DistillConfig, TrainConfig
from vllm_medusa.training.hidden_states import HiddenStateSet, label_rows
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.training.trainer import MedusaOneTrainer

PERIOD = 13


def _cycle_data(num_heads: int, copies: int = 40, seed: int = 0):
    """A text that repeats 0..12 for ever; hidden state = embedding of the *next* token.

    So the lm_head (the same table) is right by itself, and head k must learn a fixed map.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(PERIOD, 24, generator=generator)
    tokens = np.arange(PERIOD * copies) % PERIOD
    positions, labels = label_rows(tokens, np.ones(len(tokens), bool), num_heads)
    hidden = table[torch.from_numpy(labels[:, 0])]
    offsets = np.array([0, len(positions)])
    return HiddenStateSet(hidden, torch.from_numpy(labels), offsets), table


def _config(**changes):
    defaults = {"num_heads": 3, "num_layers": 2, "epochs": 40, "batch_tokens": 64,
                "learning_rate": 0.01, "warmup_steps": 5, "checkpoint_every": 0}  # fmt: skip
    return TrainConfig(**{**defaults, **changes})


def test_heads_start_as_the_lm_head():
    heads = TrainableHeads(3, 2, 8)
    hidden = torch.randn(5, 8)
    assert torch.equal(heads(hidden), hidden.expand(3, 5, 8))


def test_block_is_residual_silu_and_layers_are_independent():
    torch.manual_seed(0)
    heads = TrainableHeads(2, 3, 6)
    torch.nn.init.normal_(heads.weight)
    torch.nn.init.normal_(heads.bias)
    hidden = torch.randn(4, 6)
    for head in range(2):
        expected = hidden
        for layer in range(3):
            product = expected @ heads.weight[layer, head].T + heads.bias[layer, head]
            expected = expected + product * torch.sigmoid(product)
        # Batched against single product in float32: rounding in the last bits.
        torch.testing.assert_close(heads(hidden)[head], expected, atol=1e-4, rtol=1e-4)
    before = heads(hidden).detach()
    with torch.no_grad():
        heads.weight[2, 1] = 0
        heads.bias[2, 1] = 0
    changed = heads(hidden).detach() != before
    assert not changed[0].any()
    assert changed[1].any()


def test_training_moves_every_layer_of_every_head_differently():
    data, table = _cycle_data(3)
    heads = MedusaOneTrainer(_config(epochs=1), data, table).train()
    flat = heads.weight.detach().flatten(0, 1)
    assert all(flat[i].any() for i in range(6))
    for i in range(6):
        for j in range(i):
            assert not torch.equal(flat[i], flat[j])


def test_heads_learn_a_deterministic_text():
    data, table = _cycle_data(3)
    trainer = MedusaOneTrainer(_config(), data, table)
    heads = trainer.train()
    with torch.no_grad():
        guesses = (heads(data.hidden) @ table.T).argmax(-1)
    for k in range(1, 4):
        valid = data.labels[:, k] >= 0
        assert torch.equal(guesses[k - 1][valid], data.labels[valid, k])
    assert trainer.history[0][2][0] > 10 * trainer.history[-1][2][0]


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    data, table = _cycle_data(3)
    whole = MedusaOneTrainer(_config(epochs=3), data, table).train()
    MedusaOneTrainer(_config(epochs=3), data, table, tmp_path).train(until_step=11)
    resumed = MedusaOneTrainer.resume(tmp_path, data, table)
    assert resumed.step == 11
    heads = resumed.train()
    assert resumed.step == resumed.total_steps == 24
    assert torch.equal(heads.weight, whole.weight)
    assert torch.equal(heads.bias, whole.bias)


def test_resume_refuses_other_data(tmp_path):
    data, table = _cycle_data(3)
    MedusaOneTrainer(_config(epochs=1), data, table, tmp_path).train(until_step=1)
    other, _ = _cycle_data(3, copies=30)
    with pytest.raises(ValueError, match="was trained on 519 rows, the data holds 389"):
        MedusaOneTrainer.resume(tmp_path, other, table)


def test_learning_rate_warms_up_and_ends_at_zero():
    data, table = _cycle_data(3)
    trainer = MedusaOneTrainer(_config(warmup_steps=4), data, table)
    assert trainer.learning_rate(0.0) == pytest.approx(0.0025)
    trainer.step = 100
    assert trainer.learning_rate(0.5) == pytest.approx(0.005)
    assert trainer.learning_rate(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "config", [TrainConfig(num_heads=5, max_seconds=3.5), DistillConfig(seed=7)],
    ids=["train", "distill"],
)  # fmt: skip
def test_settings_round_trip(tmp_path, config):
    config.save(tmp_path / "c.json")
    assert type(config).load(tmp_path / "c.json") == config


def test_settings_refuse_bad_values():
    with pytest.raises(ValueError, match="num_heads is 0; expected at least 1"):
        TrainConfig(num_heads=0)
    with pytest.raises(ValueError, match="learning_rate is -1; expected a positive number"):
        TrainConfig(learning_rate=-1)
    with pytest.raises(ValueError, match=r"settings is \['lr'\]; expected only the keys"):
        TrainConfig.from_dict({"lr": 1})
    with pytest.raises(ValueError, match="max_model_len is 300"):
        DistillConfig(max_model_len=300)


def test_trainer_names_what_the_data_lacks():
    data, table = _cycle_data(2)
    with pytest.raises(ValueError, match="data holds labels for 2 heads"):
        MedusaOneTrainer(_config(), data, table)
    with pytest.raises(ValueError, match="batch_tokens is 4096; expected at most the 519 rows"):
        MedusaOneTrainer(_config(num_heads=2, batch_tokens=4096), data, table)
