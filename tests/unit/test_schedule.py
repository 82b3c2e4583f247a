"""Nodes per batch size: the default schedule and what is refused."""

from __future__ import annotations

import itertools

import pytest

from vllm_medusa.config import MedusaOptions, default_schedule, with_plain_steps


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 8, 31, 62, 63])
@pytest.mark.parametrize("row_budget", [1, 64, 200, 256])
def test_schedule_stays_within_the_row_budget(num_nodes, row_budget):
    schedule = default_schedule(num_nodes, row_budget)
    assert schedule[0][0] == 1
    assert schedule[0][2] == num_nodes
    for (_, last, nodes), (first, _, fewer) in itertools.pairwise(schedule):
        assert first == last + 1
        assert fewer < nodes
        # A single request verifies its whole tree whatever it costs.
        assert last * (nodes + 1) <= row_budget or last == first - 1
    assert [nodes for _, _, nodes in schedule[-2:]] == [1, 0]


def test_no_budget_means_no_schedule():
    assert default_schedule(63, None) is None


def test_schedule_of_the_largest_tree():
    assert default_schedule(63, 256) == [
        (1, 4, 63),
        (5, 8, 31),
        (9, 16, 15),
        (17, 32, 7),
        (33, 64, 3),
        (65, 128, 1),
        (129, 256, 0),
    ]


@pytest.mark.parametrize("most", [1, 2, 4, 5, 64, 128, 129, 256, 1024])
def test_some_batch_decodes_plainly(most):
    """Else there would be no graph for it, and choosing 0 nodes would be dear."""
    schedule = with_plain_steps(default_schedule(63, 256), most)
    nodes = {
        size: n for first, last, n in schedule for size in range(first, last + 1) if size <= most
    }
    assert list(nodes) == list(range(1, min(most, 256) + 1))
    assert most == 1 or nodes[min(most, 256)] == 0
    assert all(n == 63 for size, n in nodes.items() if size < min(5, most))


@pytest.mark.vllm
@pytest.mark.parametrize("schedule", [[], [[2, 4, 3]], [[1, 4]], [[1, 4, -1]], "many"])
def test_schedule_that_vllm_cannot_read_is_refused(schedule):
    from vllm_medusa.start_choices import choose_schedule
    from vllm_medusa.tree import TokenTree

    options = MedusaOptions(model="heads", num_speculative_tokens_per_batch_size=schedule)
    with pytest.raises(ValueError, match="num_speculative_tokens_per_batch_size="):
        choose_schedule(options, TokenTree.from_widths([2, 2]))
