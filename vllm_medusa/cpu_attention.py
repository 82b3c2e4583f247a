"""Tree attention on a CPU in float32, for one layer, from a plan made once per step.

Per tile (:class:`TilePlan`): copy the keys and values out of the cache as float32, two
batched matrix products with a softmax between. The rows of all query heads of a KV head
are one matrix, so each key is read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_medusa.cpu_tree_plan import HeadShape, Segment, TilePlan, TreePlan


def cache_halves(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a layer's keys and values in vLLM's "vec" and "vec16" layout.

    Parameters
    ----------
    kv_cache : torch.Tensor, [num_blocks, num_kv_heads, block_size, 2 * head_size]
        As vLLM hands it out; its last two axes are one run of memory.

    Returns
    -------
    keys : torch.Tensor, [num_blocks, num_kv_heads, head_size, block_size]
    values : torch.Tensor, [num_blocks, num_kv_heads, block_size, head_size]
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * (width // 2))
    keys, values = halves.unbind(2)
    return (
        keys.view(num_blocks, num_kv_heads, width // 2, block_size),
        values.view(num_blocks, num_kv_heads, block_size, width // 2),
    )


class LayerCache:
    """A layer's cache as the two ways of fetching blocks need it; made once per layer.

    Parameters
    ----------
    kv_cache : torch.Tensor, [num_blocks, num_kv_heads, block_size, 2 * head_size]
    """

    def __init__(self, kv_cache: torch.Tensor):
        keys, values = cache_halves(kv_cache)
        self.source = kv_cache
        self.num_kv_heads = kv_cache.shape[1]
        self.flat = kv_cache.view(kv_cache.shape[0], -1)
        self.keys = keys.permute(1, 2, 0, 3)  # [num_kv_heads, head_size, num_blocks, block_size]
        self.values = values.transpose(0, 1)  # [num_kv_heads, num_blocks, block_size, head_size]


def tree_attention(
    output: torch.Tensor,  # [>= num_tokens, num_heads, head_size]
    query: torch.Tensor,  # [>= num_tokens, num_heads, head_size]
    cache: LayerCache,
    plan: TreePlan,
    *,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,  # [num_heads]
) -> None:
    """Attention of the tree rows, written to the leading rows of ``output``.

    Parameters
    ----------
    output, query : torch.Tensor, [>= num_tokens, num_heads, head_size]
        float32, bfloat16 or float16; sums are float32 in each case.
    cache : LayerCache
        The layer's keys and values, this step's rows included.
    plan : TreePlan
    scale : float
        Factor of the products of queries and keys.
    soft_cap : float
        Scores become ``soft_cap * tanh(score / soft_cap)``; 0 for none.
    sinks : torch.Tensor or None, [num_heads]
        Score of one more key per head, whose value is zero.
    """
    num_heads, head_size = query.shape[1:]
    num_kv_heads = cache.num_kv_heads
    group = num_heads // num_kv_heads
    key = (num_kv_heads, group, head_size, sinks is not None, cache.flat.dtype)
    space = plan.buffers.get(key)
    if space is None:
        space = plan.buffers[key] = _segment_buffers(plan, HeadShape(*key[:4]), key[4])
    target = output
    if plan.token_order is not None:
        query = query.index_select(0, plan.token_order)
        target = torch.empty_like(query)
    for segment, buffers in zip(plan.segments, space, strict=True):
        start, num_tokens = segment.first_token, segment.num_reqs * segment.num_rows
        by_row = (segment.num_reqs, segment.num_rows, num_kv_heads, group, head_size)
        buffers.query_rows.copy_(query.narrow(0, start, num_tokens).view(by_row))
        for tile, work in zip(segment.tiles, buffers.tiles, strict=True):
            _tile_attention(tile, work, cache, scale, soft_cap, sinks)
        target.narrow(0, start, num_tokens).view(by_row).copy_(buffers.mixed_rows)
    if plan.token_order is not None:
        output[: plan.num_tokens].index_copy_(0, plan.token_order, target)


@dataclass(frozen=True)
class _TileBuffers:
    """Views into the work space; H = num_kv_heads, M = group * num_rows, L = num_keys."""

    query: torch.Tensor  # [num_reqs * H, M, head_size]
    gathered: torch.Tensor | None  # [num_reqs * num_blocks, block] in the cache's dtype
    gathered_keys: torch.Tensor | None  # as keys_in, before conversion
    gathered_values: torch.Tensor | None  # as values_in, before conversion
    keys_in: torch.Tensor  # [(num_reqs,) H, head_size, num_blocks, block_size]
    values_in: torch.Tensor  # [(num_reqs,) H, num_blocks, block_size, head_size]
    stale_values: torch.Tensor  # [num_reqs, H, L - stale_start, head_size]
    keys: torch.Tensor  # [num_reqs * H, head_size, L]
    values: torch.Tensor  # [num_reqs * H, L, head_size]
    products: torch.Tensor  # [num_reqs * H, M, L]
    hidden: torch.Tensor  # [num_reqs, H, group, num_rows, L - hidden_start], part of products
    sinks: torch.Tensor | None  # [num_reqs, H, group, num_rows], behind the products
    scores: torch.Tensor  # [num_reqs * H, M, L (+ 1 with sinks)]
    weights: torch.Tensor  # [num_reqs * H, M, L]
    softmax: torch.Tensor  # [num_reqs * H, M, L (+ 1 with sinks)]
    mixed: torch.Tensor  # [num_reqs * H, M, head_size]


@dataclass(frozen=True)
class _SegmentBuffers:
    query_rows: torch.Tensor  # [num_reqs, num_rows, H, group, head_size] view, float32
    mixed_rows: torch.Tensor  # the same of the results
    tiles: list[_TileBuffers]


def _tile_attention(
    tile: TilePlan,
    work: _TileBuffers,
    cache: LayerCache,
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None,
) -> None:
    if work.gathered is None:
        work.keys_in.copy_(cache.keys[:, :, tile.blocks])
        work.values_in.copy_(cache.values[:, tile.blocks])
    else:
        torch.index_select(cache.flat, 0, tile.blocks, out=work.gathered)
        work.keys_in.copy_(work.gathered_keys)
        work.values_in.copy_(work.gathered_values)
    if tile.stale is not None:
        # Whatever an earlier request left there, a weight of 0 must give 0.
        work.stale_values.masked_fill_(tile.stale, 0.0)
    alpha = scale / soft_cap if soft_cap else scale
    out = work.products
    torch.baddbmm(out, work.query, work.keys, beta=0, alpha=alpha, out=out)
    if soft_cap:
        out.tanh_().mul_(soft_cap)
    work.hidden.masked_fill_(tile.hidden, float("-inf"))
    if sinks is not None:
        work.sinks.copy_(sinks.view(work.sinks.shape[1:3]).unsqueeze(-1))
    torch.softmax(work.scores, -1, out=work.softmax)
    torch.bmm(work.weights, work.values, out=work.mixed)


def _segment_buffers(plan: TreePlan, shape: HeadShape, dtype: torch.dtype) -> list[_SegmentBuffers]:
    """Work space of all segments: keys, values and scores reused from tile to tile."""
    tiles = [tile for segment in plan.segments for tile in segment.tiles]
    block = shape.num_kv_heads * plan.block_size * shape.head_size
    keys = max(tile.num_reqs * tile.num_blocks for tile in tiles) * block
    scores = max(
        tile.num_reqs * tile.num_rows * (tile.num_keys + shape.has_sinks) for tile in tiles
    ) * (shape.num_kv_heads * shape.group)
    space = {
        "gathered": torch.empty(2 * keys, dtype=dtype),
        "keys": torch.empty(keys),
        "values": torch.empty(keys),
        "scores": torch.empty(scores),
        "weights": torch.empty(scores),
    }
    return [_one_segment(segment, plan.block_size, shape, space) for segment in plan.segments]


def _one_segment(
    segment: Segment, block_size: int, shape: HeadShape, space: dict[str, torch.Tensor]
) -> _SegmentBuffers:
    heads, group, size, _ = shape
    query = torch.empty(segment.num_reqs, heads, group, segment.num_rows, size)
    mixed = torch.empty_like(query)
    tiles = []
    for tile in segment.tiles:
        own = slice(tile.first_request, tile.first_request + tile.num_reqs)
        rows = (tile.num_reqs * heads, group * tile.num_rows, size)
        tiles.append(
            _tile_buffers(
                tile, block_size, shape, space, query[own].view(rows), mixed[own].view(rows)
            )
        )
    return _SegmentBuffers(query.permute(0, 3, 1, 2, 4), mixed.permute(0, 3, 1, 2, 4), tiles)


def _tile_buffers(
    tile: TilePlan,
    block_size: int,
    shape: HeadShape,
    space: dict[str, torch.Tensor],
    query: torch.Tensor,
    mixed: torch.Tensor,
) -> _TileBuffers:
    heads, group, size, has_sinks = shape
    n, rows, blocks, columns = tile.num_reqs, tile.num_rows, tile.num_blocks, tile.num_keys

    def view(name: str, *axes: int) -> torch.Tensor:
        return space[name][: torch.Size(axes).numel()].view(axes)

    keys = view("keys", n, heads, size, blocks, block_size)
    values = view("values", n, heads, blocks, block_size, size)
    flat_values = values.view(n, heads, blocks * block_size, size)
    width = columns + has_sinks
    scores = view("scores", n * heads, group * rows, width)
    softmax = view("weights", n * heads, group * rows, width)
    by_head = scores.view(n, heads, group, rows, width)
    gathered = gathered_keys = gathered_values = None
    if isinstance(tile.blocks, slice):
        keys, values = keys[0], values[0]
    else:
        halves = view("gathered", n, blocks, heads, 2, block_size * size)
        gathered = halves.view(n * blocks, -1)
        key_half, value_half = halves.unbind(3)
        gathered_keys = key_half.view(n, blocks, heads, size, block_size).permute(0, 2, 3, 1, 4)
        gathered_values = value_half.view(n, blocks, heads, block_size, size).transpose(1, 2)
    return _TileBuffers(
        query=query,
        gathered=gathered,
        gathered_keys=gathered_keys,
        gathered_values=gathered_values,
        keys_in=keys,
        values_in=values,
        stale_values=flat_values[:, :, tile.stale_start : columns],
        keys=view("keys", n * heads, size, blocks * block_size)[..., :columns],
        values=flat_values.view(n * heads, blocks * block_size, size)[:, :columns],
        products=scores[..., :columns],
        hidden=by_head[..., tile.hidden_start : columns],
        sinks=by_head[..., columns] if has_sinks else None,
        scores=scores,
        weights=softmax[..., :columns],
        softmax=softmax,
        mixed=mixed,
    )
