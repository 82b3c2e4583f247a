"""What tree attention on a CPU does this step: worked out once, then run by every layer.

vLLM's CPU kernels know causal rows only. The tree rows are computed here from
vLLM's own cache, whose blocks (ISA "vec" and "vec16") hold, per KV head, the keys
transposed as [head_size, block_size], then the values as [block_size, head_size].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

# Requests with as many rows and blocks share one chain of operations until their scores
# reach this many float32 (1 MiB). Two Zen 3 cores, 3 KV heads, batch 4, 17 rows, 512 keys:
# 1.29 ms a layer against 1.71 ms one by one, since 3 heads do not divide among 2 cores;
# on one core any size up to this costs the same.
MAX_TILE_SCORES = 1 << 18


class HeadShape(NamedTuple):
    """Heads of one attention layer."""

    num_kv_heads: int
    group: int  # query heads per KV head
    head_size: int
    has_sinks: bool


@dataclass(frozen=True)
class TilePlan:
    """Requests with the same number of rows and of blocks, computed together.

    Attributes
    ----------
    first_request : int
        Position of the first request in the plan's order.
    num_reqs, num_rows, num_blocks : int
    num_keys : int
        Columns of the scores: the most keys of any request, from its first visible block on.
    blocks : slice or torch.Tensor, [num_reqs * num_blocks] int64
        Cache blocks; a slice when one request's blocks are neighbours.
    hidden_start : int
        First column that is hidden from any row.
    hidden : torch.Tensor, [num_reqs, 1, 1, num_rows, num_keys - hidden_start] bool
        True where a row must not see a key.
    stale_start : int
        First column that is not a key of every request.
    stale : torch.Tensor or None, [num_reqs, 1, num_keys - stale_start, 1] bool
        True where a column is no key of its request.
    """

    first_request: int
    num_reqs: int
    num_rows: int
    num_blocks: int
    num_keys: int
    blocks: slice | torch.Tensor
    hidden_start: int
    hidden: torch.Tensor
    stale_start: int
    stale: torch.Tensor | None


class Segment(NamedTuple):
    """Neighbouring requests with the same number of rows, tile after tile."""

    first_token: int
    num_reqs: int
    num_rows: int
    tiles: list[TilePlan]


@dataclass(frozen=True)
class TreePlan:
    """One step's tree requests.

    Attributes
    ----------
    num_tokens : int
        Query rows of all tree requests; they lead the batch.
    block_size : int
    segments : list of Segment
    token_order : torch.Tensor or None, [num_tokens] int64
        Plan's row -> batch's row; None where both orders are the same.
    buffers : dict
        Work space per heads and cache dtype, shared by all layers.
    """

    num_tokens: int
    block_size: int
    segments: list[Segment]
    token_order: torch.Tensor | None
    buffers: dict = field(default_factory=dict)


def plan_trees(
    num_rows: np.ndarray,  # [num_reqs] int
    seq_lens: np.ndarray,  # [num_reqs] int, context + rows
    block_table: torch.Tensor,  # [>= num_reqs, max_blocks] int32
    masks: torch.Tensor,  # [>= num_reqs, W] int64, or [>= num_reqs, 2, W]
    *,
    block_size: int,
    num_heads: int,
    sliding_window: int = -1,
) -> TreePlan:
    """Sort the tree requests into tiles and work out what each row sees.

    Parameters
    ----------
    num_rows : numpy.ndarray, [num_reqs]
        Rows (root + nodes) of each request; its whole query.
    seq_lens : numpy.ndarray, [num_reqs]
        Keys of each request, the rows included.
    block_table : torch.Tensor, [>= num_reqs, max_blocks] int32
    masks : torch.Tensor, [>= num_reqs, W] int64, or [>= num_reqs, 2, W] for W > 64
        Bit j % 64 of word i in part j // 64: row i sees row j.
    block_size : int
        Slots of a cache block.
    num_heads : int
        Query heads; with the rows, they size the tiles.
    sliding_window : int
        Keys a row sees back from its tree position (context + depth), itself
        included; -1 for all.

    Examples
    --------
    Two requests with 300 and 310 keys in blocks of 128 and 9 rows each have 3 blocks
    each: one tile of 310 columns, in which the last 10 are stale for the first.
    """
    requests = [
        _visible(int(rows), int(keys), words, block_size, sliding_window)
        for rows, keys, words in zip(num_rows, seq_lens, masks.numpy(), strict=False)
    ]
    order = sorted(range(len(requests)), key=lambda r: requests[r].size)
    segments = _segments(requests, order, block_table.numpy(), num_heads * block_size)
    return TreePlan(int(num_rows.sum()), block_size, segments, _token_order(order, num_rows))


def _segments(
    requests: list[_Request], order: list[int], table: np.ndarray, block_scores: int
) -> list[Segment]:
    """Tiles of equal requests; ``block_scores``: scores of one row with one block."""
    segments: list[Segment] = []
    done = token = 0
    while done < len(order):
        first = requests[order[done]]
        scores = first.num_rows * first.num_blocks * block_scores
        limit = done + max(1, MAX_TILE_SCORES // scores)
        members = [r for r in order[done:limit] if requests[r].size == first.size]
        if not segments or segments[-1].num_rows != first.num_rows:
            segments.append(Segment(token, 0, first.num_rows, []))
        tile = _tile(segments[-1].num_reqs, [requests[r] for r in members], table[members])
        segments[-1].tiles.append(tile)
        segments[-1] = segments[-1]._replace(num_reqs=segments[-1].num_reqs + len(members))
        done += len(members)
        token += len(members) * first.num_rows
    return segments


class _Request(NamedTuple):
    """One request's keys from its first visible block on."""

    num_rows: int
    first_block: int
    num_blocks: int
    num_keys: int
    hidden_start: int  # first column hidden from any row
    hidden: np.ndarray  # [num_rows, num_keys - hidden_start] bool

    @property
    def size(self) -> tuple[int, int]:
        return self.num_rows, self.num_blocks


def _visible(
    num_rows: int,
    num_keys: int,
    words: np.ndarray,  # [W] or [2, W] int64
    block_size: int,
    sliding_window: int,
) -> _Request:
    context = num_keys - num_rows
    rows = np.arange(num_rows)
    parts = words.reshape(-1, words.shape[-1])[rows // 64, :num_rows]  # [seen, seeing]
    bits = (parts.T >> rows % 64) & 1
    depths = bits.sum(1) - 1
    first_key = max(0, context - sliding_window + 1) if sliding_window > 0 else 0
    first_block = first_key // block_size
    start = first_block * block_size
    hidden, hidden_start = bits == 0, context - start
    if sliding_window > 0 and context + int(depths.max()) >= sliding_window:
        positions = np.concatenate([np.arange(start, context), context + depths])
        beyond = (context + depths)[:, None] - positions >= sliding_window
        beyond[:, hidden_start:] |= hidden
        hidden, hidden_start = beyond, 0
    num_blocks = -(-num_keys // block_size) - first_block
    return _Request(num_rows, first_block, num_blocks, num_keys - start, hidden_start, hidden)


def _tile(first_request: int, members: list[_Request], table: np.ndarray) -> TilePlan:
    num_reqs, (num_rows, num_blocks) = len(members), members[0].size
    num_keys = max(m.num_keys for m in members)
    hidden_start = min(m.hidden_start for m in members)
    stale_start = min(m.num_keys for m in members)
    hidden = np.zeros((num_reqs, 1, 1, num_rows, num_keys - hidden_start), dtype=bool)
    stale = np.zeros((num_reqs, 1, num_keys - stale_start, 1), dtype=bool)
    blocks = np.empty((num_reqs, num_blocks), dtype=np.int64)
    for index, member in enumerate(members):
        own = slice(member.hidden_start - hidden_start, member.num_keys - hidden_start)
        hidden[index, 0, 0, :, own] = member.hidden
        hidden[index, 0, 0, :, own.stop :] = True
        stale[index, 0, member.num_keys - stale_start :] = True
        blocks[index] = table[index, member.first_block : member.first_block + num_blocks]
    return TilePlan(
        first_request=first_request,
        num_reqs=num_reqs,
        num_rows=num_rows,
        num_blocks=num_blocks,
        num_keys=num_keys,
        blocks=_neighbours(blocks.ravel()) if num_reqs == 1 else torch.from_numpy(blocks.ravel()),
        hidden_start=hidden_start,
        hidden=torch.from_numpy(hidden),
        stale_start=stale_start,
        stale=torch.from_numpy(stale) if stale_start < num_keys else None,
    )


def _neighbours(blocks: np.ndarray) -> slice | torch.Tensor:
    """A slice where the blocks follow one another (no gather needed), else their numbers."""
    if (np.diff(blocks) == 1).all():
        return slice(int(blocks[0]), int(blocks[-1]) + 1)
    return torch.from_numpy(blocks)


def _token_order(order: list[int], num_rows: np.ndarray) -> torch.Tensor | None:
    if order == sorted(order):
        return None
    starts = np.concatenate([[0], np.cumsum(num_rows)])
    rows = [np.arange(starts[r], starts[r + 1]) for r in order]
    return torch.from_numpy(np.concatenate(rows))
