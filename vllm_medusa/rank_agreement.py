"""What the ranks of a cluster must agree on: that the heads were read, and (in the check that
``VLLM_MEDUSA_CHECK_RANKS=1`` switches on) every tree, every walk and every move of KV rows.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from vllm.distributed import get_pp_group, get_tp_group, get_world_group
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.utils.network_utils import get_ip

from vllm_medusa.triton_kernels.checks import WORD_BITS

T = TypeVar("T")

CHECK_VARIABLE = "VLLM_MEDUSA_CHECK_RANKS"


def check_is_on() -> bool:
    """Whether the user asked for the check; Ray carries ``VLLM_`` variables to its workers."""
    return os.environ.get(CHECK_VARIABLE, "0") not in ("", "0")


def gather_objects(group: GroupCoordinator, own: Any) -> list[Any]:
    """What every rank of ``group`` holds, by rank; all of them must call this."""
    everyone: list[Any] = [None] * group.world_size
    if group.world_size == 1:
        return [own]
    torch.distributed.all_gather_object(everyone, own, group=group.cpu_group)
    return everyone


def all_agree(own: bool) -> bool:
    """Whether it is true on every tensor-parallel rank."""
    return all(gather_objects(get_tp_group(), own))


def node_name() -> str:
    """This machine as an operator knows it: host name and address."""
    return f"{socket.gethostname()} ({get_ip()})"


def on_every_rank(load: Callable[[], T]) -> T:
    """``load()``, unless it failed on a tensor-parallel rank: then no rank waits for that one.

    Raises
    ------
    ValueError
        On all ranks, naming the node on which reading failed.
    """
    if get_world_group().world_size == 1:
        return load()
    loaded, failure = None, None
    try:
        loaded = load()
    except (ValueError, OSError) as error:
        failure = f"node {node_name()} cannot load the Medusa heads: {error}"
    failures = [found for found in gather_objects(get_tp_group(), failure) if found]
    if failures:
        raise ValueError(failures[0])
    return loaded


class RankCheck:
    """Compares what the ranks did in a step; costs host synchronisation, so for debugging only.

    Tensor-parallel ranks are compared on their drafts, output tokens (whose last column is the
    path), counts and positions; pipeline stages on the rows that they moved.

    Parameters
    ----------
    runner : TreeRunnerMixin
        Whose request states are compared.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        self.step = 0
        self.walk: tuple = ()
        # Step -> request slot -> (root position, path mask's words).
        self.moved: dict[int, dict[int, tuple[int, tuple[int, ...]]]] = {}
        group = get_pp_group()
        # An earlier stage hears of a walk as many steps later as there are stages.
        self.delay = 0 if group.is_last_rank else group.world_size

    def begin_step(self) -> None:
        """To be called when a step begins, before anything is noted in it."""
        self.step += 1

    def note(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs] int64, -1: skip
        sampled_tokens: torch.Tensor,  # [num_reqs, N + 1] or [num_reqs, 1] int64
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_computed_tokens: torch.Tensor,  # [max_num_reqs] int32, already advanced
    ) -> None:
        """Remember a walk and the rows that it moves."""
        slots, counts = idx_mapping.tolist(), num_sampled.tolist()
        tokens, computed = sampled_tokens.tolist(), num_computed_tokens.tolist()
        self.walk = (slots, counts, tokens)
        moved = self.moved.setdefault(self.step - self.delay, {})
        for slot, count, row in zip(slots, counts, tokens, strict=True):
            if slot >= 0 and count > 0:
                moved[slot] = (computed[slot] - count, self._path(row, count))

    def _path(self, row: list[int], count: int) -> tuple[int, ...]:
        """Mask words of the rows that move in an output row; none where none does."""
        width = self.runner.decode_query_len
        # A path that fills every column has a token where the mask would be, and nothing moves.
        if len(row) < width or count == width:
            return ()
        first, *more = row[-2:] if width > WORD_BITS else row[-1:]
        words = (first & ~1, *more)  # the root stays
        return words if any(words) else ()

    def compare(self) -> None:
        """Compare the last step's walk, its drafts, and the moves that all stages have done.

        To be called when a step samples: all its hidden states are sent by then, so no stage
        waits for another one in two places.

        Raises
        ------
        RuntimeError
            Naming the step, the ranks and what differs.
        """
        states = self.runner.req_states
        found = {
            "walks": self.walk,
            "draft tokens": states.draft_tokens.tolist(),
            "computed tokens": states.num_computed_tokens.gpu.tolist(),
        }
        digests = {name: _digest(value) for name, value in found.items()}
        for rank, other in enumerate(gather_objects(get_tp_group(), digests)):
            for name, digest in digests.items():
                self._require(other[name] == digest, name, "tensor-parallel rank", rank)
        group = get_pp_group()
        *earlier, last = gather_objects(group, self.moved)
        for stage, moved in enumerate(earlier):
            for step, rows in moved.items():
                # An earlier stage leaves out requests that ended meanwhile.
                same = all(last.get(step, {}).get(slot) == move for slot, move in rows.items())
                self._require(same, "moved rows", "pipeline stage", stage)
        heard = self.step - group.world_size
        self.moved = {step: rows for step, rows in self.moved.items() if step > heard}

    def _require(self, same: bool, what: str, kind: str, rank: int) -> None:
        if not same:
            raise RuntimeError(
                f"{CHECK_VARIABLE}: {what} of step {self.step} differ between {kind} {rank} and "
                f"rank {get_world_group().rank} on node {node_name()}"
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
