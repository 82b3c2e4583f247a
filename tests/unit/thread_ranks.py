"""Tensor-parallel ranks as threads of one process, for tests of what ranks compute together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_medusa import rank_agreement, sharded_draft


class ThreadRanks:
    """Runs a function once per rank; collectives meet at a barrier."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.local = threading.local()
        self.slots: list[Any] = [None] * world_size

    def exchange(self, own: Any) -> list[Any]:
        """What every rank brought, by rank."""
        self.slots[self.local.rank] = own
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand as the tensor-parallel ranks of ``sharded_draft``."""
        for name, value in {
            "get_tensor_model_parallel_rank": lambda: self.local.rank,
            "get_tensor_model_parallel_world_size": lambda: self.world_size,
            "tensor_model_parallel_all_gather": lambda x: torch.cat(self.exchange(x), -1),
            "tensor_model_parallel_all_reduce": lambda x: sum(self.exchange(x)),
            "all_agree": lambda own: all(self.exchange(own)),
        }.items():
            monkeypatch.setattr(sharded_draft, name, value)

    def install_groups(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        """Stand as the ``tensor`` or ``pipeline`` ranks of ``rank_agreement``."""

        def gather(group: Group, own: Any) -> list[Any]:
            return self.exchange(own) if group.is_ours else [own]

        groups = {"get_tp_group": kind == "tensor", "get_pp_group": kind == "pipeline",
                  "get_world_group": True}  # fmt: skip
        for name, is_ours in groups.items():
            group = Group(self, is_ours)
            monkeypatch.setattr(rank_agreement, name, lambda group=group: group)
        monkeypatch.setattr(rank_agreement, "gather_objects", gather)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """``function(rank)`` of every rank at once; the first error of a rank is raised."""
        results, errors = [None] * self.world_size, []

        def call(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = function(rank)
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=call, args=(r,)) for r in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


class Group:
    """What of vLLM's group coordinator is read; ranks of another kind are alone."""

    def __init__(self, ranks: ThreadRanks, is_ours: bool):
        self.ranks, self.is_ours = ranks, is_ours
        self.world_size = ranks.world_size if is_ours else 1

    @property
    def rank(self) -> int:
        """Of the calling thread."""
        return self.ranks.local.rank

    @property
    def is_last_rank(self) -> bool:
        """Whether no stage comes after the calling thread's."""
        return not self.is_ours or self.rank == self.world_size - 1
