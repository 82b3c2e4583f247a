"""The check that ranks do the same, and reading heads on all of them or on none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from thread_ranks import ThreadRanks

from vllm_medusa.rank_agreement import RankCheck, check_is_on, on_every_rank

pytestmark = pytest.mark.vllm

WIDTH, SLOTS = 8, 4


def fake_runner(width: int = WIDTH) -> SimpleNamespace:
    states = SimpleNamespace(
        draft_tokens=torch.zeros(SLOTS, width - 1, dtype=torch.int64),
        num_computed_tokens=SimpleNamespace(gpu=torch.full((SLOTS,), 20)),
    )
    return SimpleNamespace(req_states=states, decode_query_len=width)


def note(check: RankCheck, slots: list[int], masks: list[list[int]], counts: list[int]) -> None:
    """A walk of which only the path masks, in the last columns, and the counts matter."""
    width = check.runner.decode_query_len
    tokens = torch.zeros(len(slots), width, dtype=torch.int64)
    for row, words in zip(tokens, masks, strict=True):
        row[width - len(words) :] = torch.tensor(words)
    check.note(
        torch.tensor(slots),
        tokens,
        torch.tensor(counts, dtype=torch.int32),
        check.runner.req_states.num_computed_tokens.gpu,
    )


@pytest.mark.parametrize("differs", ["nothing", "draft tokens", "walks", "computed tokens"])
def test_tensor_parallel_ranks(monkeypatch, differs):
    ranks = ThreadRanks(2)
    ranks.install_groups(monkeypatch, "tensor")

    def step(rank: int) -> None:
        check = RankCheck(fake_runner())
        states = check.runner.req_states
        check.begin_step()
        note(check, [2], [[0b101]], [2])
        if rank == 1 and differs == "draft tokens":
            states.draft_tokens[3, 0] = 1
        elif rank == 1 and differs == "walks":
            note(check, [2], [[0b11]], [2])
        elif rank == 1 and differs == "computed tokens":
            states.num_computed_tokens.gpu[0] += 1
        check.compare()

    if differs == "nothing":
        ranks.run(step)
    else:
        with pytest.raises(RuntimeError, match=f"{differs} of step 1 differ between tensor-par"):
            ranks.run(step)


def stages(monkeypatch, paths: list[list[int]], spoilt_step: int | None, width: int = WIDTH):
    """Two stages over some steps; the first one hears of a walk two steps later."""
    ranks = ThreadRanks(2)
    ranks.install_groups(monkeypatch, "pipeline")

    def run(stage: int) -> RankCheck:
        check = RankCheck(fake_runner(width))
        for step in range(len(paths) + 2):
            check.begin_step()
            if stage == 0 and step >= 2:
                words = list(paths[step - 2])
                if step - 2 == spoilt_step:
                    words[-1] ^= 0b1000
                # One request of the batch ended meanwhile.
                note(check, [1, -1], [words, words], [2, 2])
            check.compare()
            if stage == 1 and step < len(paths):
                note(check, [1, 3], [paths[step], paths[step]], [2, 2])
        return check

    return ranks.run(run)


@pytest.mark.parametrize("width", [WIDTH, 100])
def test_pipeline_stages_move_the_same_rows(monkeypatch, width):
    words = 2 if width > 64 else 1
    paths = [[5 + step] * words for step in range(6)]
    for check in stages(monkeypatch, paths, None, width):
        # Steps that every stage has done are forgotten.
        assert len(check.moved) <= 3
    with pytest.raises(RuntimeError, match="moved rows of step 5 differ between pipeline stage 0"):
        stages(monkeypatch, paths, 2, width)


def test_a_full_chain_has_no_mask(monkeypatch):
    ThreadRanks(2).install_groups(monkeypatch, "tensor")
    check = RankCheck(fake_runner())
    check.begin_step()
    note(check, [0, 1, 2], [[0b111], [1], [0b110]], [WIDTH, 1, 0])
    # A token in the last column, the root alone, and a prompt that is not done.
    assert check.moved == {1: {0: (20 - WIDTH, ()), 1: (19, ())}}


@pytest.mark.parametrize("missing", [None, 1])
def test_heads_are_read_on_every_rank_or_on_none(monkeypatch, missing):
    ranks = ThreadRanks(3)
    ranks.install_groups(monkeypatch, "tensor")

    def load(rank: int) -> str:
        def read() -> str:
            if rank == missing:
                raise FileNotFoundError("/heads: no such file")
            return f"heads of {rank}"

        try:
            return on_every_rank(read)
        except ValueError as error:
            return str(error)

    found = ranks.run(load)
    if missing is None:
        assert found == ["heads of 0", "heads of 1", "heads of 2"]
    else:
        assert len(set(found)) == 1 and found[0].startswith("node ")
        assert found[0].endswith("cannot load the Medusa heads: /heads: no such file")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_the_variable(monkeypatch, value, expected):
    monkeypatch.delenv("VLLM_MEDUSA_CHECK_RANKS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_MEDUSA_CHECK_RANKS", value)
    assert check_is_on() is expected
