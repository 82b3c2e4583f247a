"""Simulated drafts with the sampler's noise against draws by vLLM's own arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_medusa.cpu_kernels.gumbel import gumbel_argmax
from vllm_medusa.training.calibrate import MISSED, HeadRanks
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import (
    HiddenStateSet,
    join_labels,
    label_tables,
    row_offsets,
)
from vllm_medusa.training.simulate import visited_rows
from vllm_medusa.tree import TokenTree

VOCAB, HEADS, TEMPERATURE = 40, 2, 0.7
PROMPTS, LENGTHS = (5, 3), (30, 20)

pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def served():
    """Two answers drawn with the sampler's noise, and the logits that they were drawn from.

    A hidden state is the row's logits, its lm_head the unit matrix.
    """
    from greedy_answers import TestAnswers
    from sampled_answers import FIRST_SEED, DrawnRows

    draw, pairs, states = np.random.default_rng(0), [], []
    for question, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        logits = draw.normal(size=(length, VOCAB)).astype(np.float32) * 2
        _, tokens = gumbel_argmax(
            logits, np.full(length, TEMPERATURE, np.float32),
            np.full(length, FIRST_SEED + question),
            # The last row of the prompt draws the first token.
            prompt - 1 + np.arange(length), apply_temperature=True, use_fp64=False,
        )  # fmt: skip
        pairs.append(([1] * prompt, tokens.tolist()))
        states.append(torch.from_numpy(logits))
    test = TestAnswers(ConversationSet.from_pairs(pairs), np.arange(len(pairs)))
    tables = label_tables(test.answers, HEADS)
    data = HiddenStateSet(torch.cat(states), join_labels(tables, HEADS), row_offsets(tables))
    return test, data, DrawnRows.of(test, TEMPERATURE)


def test_every_token_is_drawn_again(served):
    from sampled_answers import check_redrawn, redrawn_share

    _, data, drawn = served
    assert redrawn_share(data, torch.eye(VOCAB), drawn) == 1
    later = type(drawn)(drawn.seeds, drawn.positions + 1, TEMPERATURE)
    share = redrawn_share(data, torch.eye(VOCAB), later)
    assert share < 0.5
    with pytest.raises(ValueError, match=r"are drawn again.*V2 runner"):
        check_redrawn(share)


class RightHeads:
    """Heads that know the logits of the rows behind theirs."""

    spec = SimpleNamespace(num_heads=HEADS, sequential=False)
    token_map = None

    def __init__(self, states: torch.Tensor):
        self.states = torch.cat([states, torch.zeros(HEADS, VOCAB)])

    def draft_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = [next(i for i, s in enumerate(self.states) if torch.equal(s, h)) for h in hidden]
        return torch.stack([self.states[row + 1 : row + 1 + HEADS] for row in rows])


def test_heads_that_are_right_draft_what_is_drawn(served, monkeypatch):
    import simulate_coupled

    _, data, drawn = served
    monkeypatch.setattr(simulate_coupled, "_AT_ONCE", 7)
    heads = RightHeads(data.hidden)
    coupled = simulate_coupled.rank_drafts(heads, data, drawn, 2.0)
    assert (coupled.ranks[coupled.has_label] == 0).all()
    assert (coupled.ranks[~coupled.has_label] == MISSED).all()
    # Each head lacks a label for one more row at the end of every answer.
    assert (~coupled.has_label).sum(0).tolist() == [2, 4]
    alone = simulate_coupled.rank_drafts(heads, data, None, 2.0)
    assert (alone.ranks[alone.has_label] == 0).mean() < 0.9
    wider = simulate_coupled.rank_drafts(heads, data, drawn, 4.0)
    assert (wider.log_probs[:, :, 0] < coupled.log_probs[:, :, 0]).all()


def test_ranks_in_a_pool_end_where_the_right_path_leaves_it():
    from variant_pools import ranks_in_pool

    paths = [(0,), (1,), (0, 0), (1, 0), (0, 1)]
    # Token 7 stands behind both nodes of the first depth.
    tokens = np.array([[5, 6, 7, 7, 8]] * 5)
    labels = np.array([[5, 8], [6, 7], [6, 8], [4, 7], [5, -100]])
    expected = [[0, 1], [1, 0], [1, MISSED], [MISSED, MISSED], [0, MISSED]]
    assert ranks_in_pool(tokens, labels, paths).tolist() == expected


def test_nodes_that_were_not_drafted_are_nobodys():
    from variant_pools import ranks_in_pool

    assert ranks_in_pool(np.array([[-1]]), np.array([[-1]]), [(0,)]).tolist() == [[MISSED]]


@pytest.mark.parametrize("sequential", [False, True], ids=["independent", "sequential"])
def test_the_same_drafts_take_the_same_steps(served, sequential):
    """Both sides alike: ratios are 1; a lookup and more nodes never cost a token."""
    import simulate_coupled

    test, data, drawn = served
    tree = TokenTree.from_widths([4, 4, 3][:HEADS])
    found = simulate_coupled.rank_drafts(RightHeads(data.hidden), data, drawn, 2.0)
    if sequential:
        last = np.array([(len(path) - 1, path[-1]) for path in tree.paths])
        log_probs = found.log_probs[:, last[:, 0], last[:, 1]]
        found = HeadRanks(found.ranks, found.has_label, found.offsets, found.max_rank, log_probs)
    drafts = simulate_coupled.Drafts(found, tree.paths, sequential)
    rows = simulate_coupled.compare(drafts, drafts, test)
    assert [row["nodes"] for row in rows] == list(simulate_coupled.BUDGETS)
    for kind in simulate_coupled.TREES:
        values = [row[kind]["coupled"] for row in rows]
        assert values == sorted(values)
        assert {row[kind]["ratio"] for row in rows} == {1.0}
        assert {row[kind]["ratio_interval"] for row in rows} == {(1.0, 1.0)}
    # Heads that are always right: every step yields their nodes and one more.
    _, count = visited_rows(np.full(data.num_rows, HEADS), data.offsets)
    assert rows[-1]["one tree"]["alone"] == pytest.approx(count.tokens_per_step)


def test_coupling_is_counted_on_the_same_answers(served):
    import simulate_coupled

    _, data, _ = served
    depths = np.zeros(data.num_rows, np.int64)
    pair = simulate_coupled.pair_of(depths, depths + 1, data.offsets)
    assert pair["alone"] == 1
    # 29 and 19 tokens behind the first ones, two a step.
    assert pair["coupled"] == pytest.approx(48 / (15 + 10))
    assert pair["ratio"] == pair["coupled"]
    assert 29 / 15 <= pair["ratio_interval"][1] <= 2
