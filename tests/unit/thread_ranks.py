"""Tensor-parallel ranks as threads of one process, for tests of what ranks compute together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_medusa import sharded_draft


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
        """Put these ranks where the module under test finds vLLM's."""
        for name, value in {
            "get_tensor_model_parallel_rank": lambda: self.local.rank,
            "get_tensor_model_parallel_world_size": lambda: self.world_size,
            "tensor_model_parallel_all_gather": lambda x: torch.cat(self.exchange(x), -1),
            "tensor_model_parallel_all_reduce": lambda x: sum(self.exchange(x)),
            "all_agree": lambda own: all(self.exchange(own)),
        }.items():
            monkeypatch.setattr(sharded_draft, name, value)

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
