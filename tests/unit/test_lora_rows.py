"""Adapters of rows of logits, and the base's own logits under loaded adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA

from vllm_medusa.lora_rows import base_logits, spread_over_rows


def test_every_row_of_a_tree_has_its_request_s_adapter():
    assert spread_over_rows((7, 0, 8), np.array([3, 2])) == (7, 7, 7, 0, 0, 8)
    assert spread_over_rows((7, 0), np.array([], dtype=np.int32)) == (7, 0)
    assert spread_over_rows((5,), np.array([4])) == (5,) * 4


class Adapters:
    """Adds one to all logits, as an adapter of the lm_head adds its product."""

    @staticmethod
    def add_lora_logits(logits, *args):
        return logits.add_(1.0)


class Processor(LogitsProcessorWithLoRA):
    """vLLM's layer without its weights."""

    def __init__(self):
        nn.Module.__init__(self)
        self.punica_wrapper = Adapters

    def forward(self, hidden):
        logits = hidden.clone()
        self.punica_wrapper.add_lora_logits(logits, hidden)
        return logits


class Model(nn.Module):
    """A model that is its lm_head."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.logits_processor, self.fails = Processor(), fails

    def compute_logits(self, hidden):
        logits = self.logits_processor(hidden)
        if self.fails:
            raise RuntimeError("out of memory")
        return logits


def test_heads_see_the_base_s_lm_head():
    model, hidden = Model(), torch.arange(4.0)
    assert torch.equal(base_logits(model)(hidden), hidden)
    # The target's own logits have the adapter again.
    assert torch.equal(model.compute_logits(hidden), hidden + 1)


def test_adapters_come_back_after_a_failure():
    model = Model(fails=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        base_logits(model)(torch.zeros(2))
    assert model.logits_processor.punica_wrapper is Adapters
