"""Moves of accepted rows in vLLM's packed CPU cache against a logical model, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_attention_cases import Batch, Heads, words_of
from vllm.platforms import current_platform

from vllm_medusa.cpu_attention import cache_halves
from vllm_medusa.cpu_compaction import CPUKVCompactor

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="vLLM's CPU operations are part of its CPU build only"
)

NUM_LAYERS = 3


def logical_rows(batch: Batch, cache: torch.Tensor, request: int) -> torch.Tensor:
    """A request's rows in order, [num_keys, num_kv_heads, 2 * head_size]."""
    keys, values = cache_halves(cache)
    slots = batch.slots_of(request, 0, len(batch.keys[request]))
    blocks, offsets = slots // batch.block_size, slots % batch.block_size
    return torch.cat([keys[blocks, :, :, offsets], values[blocks, :, offsets]], dim=-1)


def filled_layers(batch: Batch) -> list[torch.Tensor]:
    """Layers that differ, in one allocation as vLLM makes it."""
    batch.write(batch.key, batch.value, batch.slots)
    storage = torch.stack([batch.cache + layer for layer in range(NUM_LAYERS)])
    return list(storage)


def moved(rows: torch.Tensor, root: int, path: list[int]) -> torch.Tensor:
    after = rows.clone()
    for rank, row in enumerate(path):
        after[root + rank] = rows[root + row]
    return after


def compact(batch: Batch, layers, paths, idx_mapping=None) -> None:
    mapping = list(range(len(paths))) if idx_mapping is None else idx_mapping
    table = batch.table.new_zeros(8, batch.table.shape[1])
    for request, slot in enumerate(mapping):
        if slot >= 0:
            table[slot] = batch.table[request]
    CPUKVCompactor(layers)(
        table,
        torch.tensor(mapping),
        torch.tensor(batch.contexts, dtype=torch.int32),
        path_masks(paths),
    )


def path_masks(paths: list[list[int]]) -> torch.Tensor:
    """One word each, two if a path reaches beyond row 63."""
    words = torch.tensor([words_of(sum(1 << row for row in path)) for path in paths])
    return words if max(max(path, default=0) for path in paths) > 63 else words[:, 0]


PATHS = {
    "one step over a sibling": [0, 2],
    "chain: nothing moves": [0, 1, 2],
    "overlapping": [0, 2, 3, 5, 6],
    "far": [0, 4, 20, 63],
    "root only": [0],
    "nothing sampled": [],
}


WIDE_PATHS = [[0, 2], [0, 64], [0, 1, 63, 64, 127], [*range(70)], [*range(63), 64], [0, 100, 101]]


def test_paths_of_two_words():
    contexts = [10, 31, 30, 100, 0, 64]
    batch = Batch(Heads(2, 1, 64), 32, contexts, [128] * len(contexts), garbage=0.5)
    layers = filled_layers(batch)
    before = [logical_rows(batch, layers[0], r) for r in range(len(contexts))]
    compact(batch, layers, WIDE_PATHS)
    for request, path in enumerate(WIDE_PATHS):
        expected = moved(before[request], contexts[request], path)
        assert torch.equal(logical_rows(batch, layers[0], request), expected), request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("block_size", "head_size"), [(32, 64), (128, 64), (48, 80)], ids=["32", "128", "vec16"]
)
def test_rows_move_in_every_layer(block_size, head_size, dtype):
    paths = list(PATHS.values())
    contexts = [10, 31, 30, 100, 0, 64]
    heads = Heads(6, 2, head_size, dtype)
    batch = Batch(heads, block_size, contexts, [64] * len(paths), garbage=0.5)
    layers = filled_layers(batch)
    before = [[logical_rows(batch, layer, r) for r in range(len(paths))] for layer in layers]
    unused = set(range(len(batch.cache))) - set(batch.table.flatten().tolist())
    compact(batch, layers, paths)
    for layer, rows in zip(layers, before, strict=True):
        for request, path in enumerate(paths):
            expected = moved(rows[request], contexts[request], path)
            assert torch.equal(logical_rows(batch, layer, request), expected), request
    for index, layer in enumerate(layers):
        assert (layer[list(unused)] == 0.5 + index).all()


def test_random_paths_agree_with_the_model():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_reqs = int(rng.integers(1, 8))
        contexts = [int(c) for c in rng.integers(0, 150, num_reqs)]
        paths = [
            [0, *sorted(rng.choice(np.arange(1, 64), int(rng.integers(0, 6)), replace=False))]
            for _ in range(num_reqs)
        ]
        paths = [[int(row) for row in path] for path in paths]
        batch = Batch(Heads(2, 1, 32), 32, contexts, [64] * num_reqs, garbage=0.0)
        layers = filled_layers(batch)
        before = [logical_rows(batch, layers[1], r) for r in range(num_reqs)]
        mapping = [int(slot) for slot in rng.permutation(8)[:num_reqs]]
        compact(batch, layers, paths, mapping)
        for request, path in enumerate(paths):
            expected = moved(before[request], contexts[request], path)
            assert torch.equal(logical_rows(batch, layers[1], request), expected)


def test_requests_without_a_table_row_are_skipped():
    batch = Batch(Heads(), 32, [40, 40], [9, 9], garbage=0.0)
    layers = filled_layers(batch)
    before = logical_rows(batch, layers[0], 0)
    compact(batch, layers, [[0, 5], [0, 5]], [-1, 3])
    assert torch.equal(logical_rows(batch, layers[0], 0), before)
    assert not torch.equal(logical_rows(batch, layers[0], 1)[41], before[41])


def test_nothing_to_move_touches_no_layer():
    compactor = CPUKVCompactor([torch.zeros(2, 1, 32, 64)])
    compactor.stacks = None  # any use would raise
    table, slots = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([0, 1])
    compactor(table, slots, torch.tensor([3, 5]), torch.tensor([0b1, 0b1111]))


def test_padded_blocks():
    batch = Batch(Heads(), 32, [20], [9], garbage=0.0)
    batch.write(batch.key, batch.value, batch.slots)
    padded = torch.zeros(len(batch.cache), batch.cache[0].numel() + 100)
    padded[:, :-100] = batch.cache.flatten(1)
    layer = padded[:, :-100].unflatten(1, batch.cache.shape[1:])
    before = logical_rows(batch, batch.cache, 0)
    compact(batch, [layer], [[0, 3, 8]])
    expected = moved(before, 20, [0, 3, 8])
    assert torch.equal(logical_rows(batch, layer.contiguous(), 0), expected)
    assert (padded[:, -100:] == 0).all()


def test_layers_that_differ_are_refused():
    one, other = torch.zeros(2, 1, 32, 64), torch.zeros(2, 2, 32, 64)
    with pytest.raises(ValueError, match=r"kv_caches\[1\] .* found shape \(2, 2, 32, 64\)"):
        CPUKVCompactor([one, other])
    with pytest.raises(ValueError, match=r"kv_caches\[0\] must hold contiguous blocks"):
        CPUKVCompactor([torch.zeros(2, 32, 2, 64).transpose(1, 2)])
