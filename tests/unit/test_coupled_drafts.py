"""Drafts that know the sampler's noise: where they are on, and which noise each node gets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from test_sequential_tree import POOL, Inputs

from vllm_medusa import start_choices
from vllm_medusa.config import MedusaOptions
from vllm_medusa.cpu_kernels.gumbel import gumbel_argmax
from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.kernels import DrawNoise
from vllm_medusa.tree_candidates import NOISE_SPREAD
from vllm_medusa.verification_step import VerificationStep

SEEDS, TEMPERATURES, LENGTHS = [11, -4, 5], [0.8, 0.0, 1.3], [40, 7, 12]


def noise_for(slots: list[int]) -> DrawNoise:
    return DrawNoise(
        torch.tensor(SEEDS), torch.tensor(TEMPERATURES),
        torch.tensor(LENGTHS, dtype=torch.int32), torch.tensor(slots), 1, 1, NOISE_SPREAD,
    )  # fmt: skip


def test_sequential_heads_that_are_right_draft_what_is_drawn():
    """The best child of every node is what the sampler would draw behind the node's path."""
    inputs = Inputs(3)
    slots = [2, 0, 1]
    drafter = inputs.drafter()
    tokens, _ = drafter.score(*inputs.arguments, noise_for(slots))
    tokens = tokens.flatten(1)
    for node, path in enumerate(POOL.paths):
        if path[-1] != 0:
            continue
        above = [POOL.paths.index(path[:d]) for d in range(1, len(path))]
        for req, slot in enumerate(slots):
            seen = [int(inputs.roots[req]), *tokens[req, above].tolist()]
            embedded = torch.zeros(1, 3, inputs.table.shape[1])
            embedded[0, : len(seen)] = inputs.table[seen]
            states = inputs.heads.forward_hidden(inputs.hidden[req : req + 1], embedded)
            logits = states[len(path) - 1, 0] @ inputs.lm_head.T
            # The root is the last known token; a child is drawn at its parent's position.
            position = LENGTHS[slot] - 1 + len(above)
            _, drawn = gumbel_argmax(
                logits[None].numpy(), np.array([TEMPERATURES[slot]], np.float32),
                np.array([SEEDS[slot]]), np.array([position]),
                apply_temperature=True, use_fp64=False,
            )  # fmt: skip
            assert tokens[req, node] == drawn[0]


def test_greedy_requests_draft_as_without_noise():
    inputs = Inputs(2)
    alone = [table.clone() for table in inputs.drafter().score(*inputs.arguments)]
    beside = inputs.drafter().score(*inputs.arguments, noise_for([0, 1]))
    for left, right in zip(alone, beside, strict=True):
        assert torch.equal(left[1], right[1])
        assert not torch.equal(left[0], right[0])


@pytest.mark.parametrize("is_typical", [False, True])
def test_typical_requests_draft_what_is_likely_not_what_is_drawn(monkeypatch, is_typical):
    name = "vllm_medusa.verification_step.needs_only_"
    for rest in ("temperature", "draw"):
        monkeypatch.setattr(name + rest, lambda *args: True)
    step = object.__new__(VerificationStep)
    step.simple, step.drawable = np.zeros(2, dtype=bool), np.zeros(2, dtype=bool)
    step.draft_temperature = torch.full((2,), 9.0)
    typical = SimpleNamespace(active=np.array([False, is_typical]))
    verifier = SimpleNamespace(typical=typical, row_sampler=None)
    step.runner = SimpleNamespace(rejection_sampler=verifier, sampler=None)
    step.add_request(1, SimpleNamespace(temperature=0.5))
    assert step.draft_temperature.tolist() == [9.0, 0.0 if is_typical else 0.5]


def choose(monkeypatch, asked=None, on_cpu=False, ranks=1, fp64=False, **fields):
    monkeypatch.setattr(
        start_choices, "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu)
    )
    return start_choices.choose_coupling(
        MedusaOptions("heads", coupled_drafts=asked), HeadSpec(3, 1, 64, **fields),
        SimpleNamespace(use_fp64_gumbel=fp64), SimpleNamespace(tensor_parallel_size=ranks),
    )  # fmt: skip


def test_on_where_it_pays(monkeypatch):
    assert choose(monkeypatch)
    assert choose(monkeypatch, ranks=2, sequential=True)
    assert not choose(monkeypatch, False)
    assert not choose(monkeypatch, on_cpu=True)
    assert choose(monkeypatch, True, on_cpu=True)


@pytest.mark.parametrize(
    ("place", "reason"),
    [({"fp64": True}, "use_fp64_gumbel draws another"), ({"ranks": 2}, "tensor_parallel_size=2")],
)
def test_off_where_it_cannot_be(monkeypatch, place, reason):
    assert not choose(monkeypatch, **place)
    with pytest.raises(ValueError, match=f"coupled_drafts=true: .*{reason}.*leave coupled_drafts"):
        choose(monkeypatch, True, **place)


@pytest.mark.parametrize("value", ["yes", 1, 0.5])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match=r"coupled_drafts=.* must be true or false"):
        MedusaOptions("heads", coupled_drafts=value)
