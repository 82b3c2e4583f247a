"""compact_kv: accepted KV rows move bit for bit, whatever overlaps, and nothing else changes."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import path_words

from vllm_medusa.triton_kernels import KVCompactor, compact_kv, kv_compaction, reference
from vllm_medusa.triton_kernels.kv_layout import group_layers

# Orders of (block, head, slot) in memory, from the outermost dimension in.
LAYOUTS = {"block-head-slot": (0, 1, 2), "block-slot-head": (0, 2, 1), "head-block-slot": (1, 0, 2)}


def make_cache(layout, num_blocks, num_heads, block_size, row, dtype, seed, offset=0):
    """A cache ``[num_blocks, num_heads, block_size, row]`` of random bytes in a given order."""
    sizes = (num_blocks, num_heads, block_size)
    order = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    count = num_blocks * num_heads * block_size * row + offset
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    memory = raw.view(dtype)[offset:].view(*(sizes[d] for d in order), row)
    return memory.permute(*(order.index(d) for d in range(3)), 3)


def random_path(rng, num_rows):
    """A path mask with bit 0 and any subset of the other rows."""
    dense = rng.choice([0.1, 0.5, 0.95])
    return 1 + sum(1 << b for b in range(1, num_rows) if rng.random() < dense)


def expected_slots(root, path_mask, num_slots):
    """Slot -> slot whose content it must hold afterwards (the definition, no move order)."""
    content = list(range(num_slots))
    for j, b in enumerate(b for b in range(128) if path_mask >> b & 1):
        content[root + j] = root + b
    return content


def as_bytes(tensor):
    return tensor.contiguous().cpu().view(torch.uint8)


def to_device(cache, device):
    """A copy on `device` with the same strides (``Tensor.to`` densifies permuted views)."""
    copy = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=device)
    return copy.copy_(cache)


def check_compaction(
    caches, tables, roots, masks, device, *, mapping=None, compactor=KVCompactor, num_rows=64
):
    """Run a compactor and compare every byte of every cache with the definition."""
    block_size = caches[0].shape[2]
    mapping = list(range(len(roots))) if mapping is None else mapping
    moved = [to_device(cache, device) for cache in caches]
    compactor(moved)(
        torch.tensor(tables, dtype=torch.int32, device=device),
        torch.tensor(mapping, dtype=torch.int64, device=device),
        torch.tensor(roots, dtype=torch.int64, device=device),
        path_words(masks, num_rows).to(device),
        num_reqs=len(roots),
    )
    for before, after in zip(caches, moved, strict=True):
        want = before.clone()
        for r, idx in enumerate(mapping):
            if idx < 0:
                continue
            blocks = torch.tensor(tables[idx])
            keys = torch.arange(len(blocks) * block_size)
            source = torch.tensor(expected_slots(roots[r], masks[r], len(keys)))
            want[blocks[keys // block_size], :, keys % block_size] = before[
                blocks[source // block_size], :, source % block_size
            ]
        assert torch.equal(as_bytes(after), as_bytes(want))


def distinct_tables(rng, num_reqs, blocks_each, num_blocks):
    blocks = rng.sample(range(num_blocks), num_reqs * blocks_each)
    return [blocks[r * blocks_each : (r + 1) * blocks_each] for r in range(num_reqs)]


@pytest.mark.parametrize("compactor", [KVCompactor, reference.KVCompactor], ids=["kernel", "twin"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "row", "block_size", "offset"),
    [
        pytest.param(torch.bfloat16, 128, 16, 0, id="bf16-two-chunks"),
        pytest.param(torch.float32, 12, 32, 0, id="fp32-odd-width"),
        pytest.param(torch.float16, 10, 16, 2, id="fp16-4-byte-words"),
        pytest.param(torch.float16, 7, 16, 1, id="fp16-2-byte-words"),
        pytest.param(torch.uint8, 33, 16, 3, id="fp8-bytes"),
        pytest.param(torch.float16, 1100, 16, 0, id="two-blocks-of-words"),
    ],
)
def test_layouts_and_word_sizes(device, compactor, layout, dtype, row, block_size, offset):
    rng = random.Random(f"{layout}{dtype}{row}")
    caches = [
        make_cache(layout, 16, 3, block_size, row, torch.int16 if dtype.itemsize == 2 else dtype,
                   seed=layer, offset=offset)
        for layer in range(2)
    ]  # fmt: skip
    tables = distinct_tables(rng, 2, 8, 16)
    check_compaction(
        caches, tables, [block_size - 1, 5], [random_path(rng, 64) for _ in range(2)],
        device, compactor=compactor,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("root-only", 1),
        ("contiguous", 0b11111),
        ("all-64", (1 << 64) - 1),
        ("last-row", 1 | 1 << 63),
        ("every-row-but-one", (1 << 64) - 1 - 2),
        ("every-other", sum(1 << b for b in range(0, 64, 2))),
        ("nine-shifted-by-one", 1 | 0b111111111 << 2),  # one more than a pass moves
        ("eight-shifted-by-one", 1 | 0b11111111 << 2),
        ("empty", 0),
    ],
)
def test_named_paths(device, name, mask):
    caches = [make_cache("block-slot-head", 9, 2, 16, 8, torch.int16, seed=3)]
    check_compaction(caches, [[8, 2, 5, 0, 7, 1]], [14], [mask], device)


@pytest.mark.parametrize("compactor", [KVCompactor, reference.KVCompactor], ids=["kernel", "twin"])
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("root-only", 1),
        ("first-word-in-place", (1 << 64) - 1),
        ("both-words-in-place", (1 << 100) - 1),
        ("all-128", (1 << 128) - 1),
        ("last-row", 1 | 1 << 127),
        ("second-word-behind-a-gap", 1 | 0b111 << 64),
        ("gap-at-the-end-of-the-first-word", (1 << 63) - 1 | 1 << 64),
        ("second-word-itself-broken", (1 << 64) - 1 | 0b10 << 64),
        ("across-the-words", 1 | 0b1111 << 62),
        ("every-other", sum(1 << b for b in range(0, 128, 2))),
        ("only-the-first-word-moves", 0b100101),
        ("empty", 0),
    ],
)
def test_paths_of_two_words(device, compactor, name, mask):
    caches = [make_cache("block-slot-head", 18, 2, 16, 8, torch.int16, seed=4)]
    tables = distinct_tables(random.Random(name), 2, 9, 18)
    check_compaction(
        caches, tables, [14, 2], [mask, 0b101], device, compactor=compactor, num_rows=128
    )


@pytest.mark.parametrize("num_layers", [3, 4, 5], ids=["fewer", "whole-group", "one-more"])
def test_layers_that_share_a_program(device, monkeypatch, num_layers):
    """Large batches: four layers a program, more rows than one pass moves."""
    monkeypatch.setattr(kv_compaction, "_PROGRAMS_AT_ONCE", 0)
    caches = [
        make_cache("block-slot-head", 18, 1, 16, 40, torch.int16, seed=layer)
        for layer in range(num_layers)
    ]
    masks = [1 | 0b111111111 << 2, 0b1, 0b1001]
    tables = distinct_tables(random.Random(num_layers), 3, 6, 18)
    check_compaction(caches, tables, [14, 2, 15], masks, device, mapping=[1, 0, 2])


def test_worked_example(device):
    """Root at 10, rows 0, 3, 5: slot 13 to 11, slot 15 to 12."""
    cache = torch.arange(32, dtype=torch.int64).view(2, 1, 16, 1).to(device)
    KVCompactor([cache])(
        torch.tensor([[1, 0]], dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.tensor([10], device=device),
        torch.tensor([0b101001], device=device),
        num_reqs=1,
    )
    assert cache[1, 0, 10:16, 0].tolist() == [26, 29, 31, 29, 30, 31]


def test_skipped_requests_and_mapping_order(device):
    rng = random.Random(5)
    caches = [make_cache("block-head-slot", 12, 2, 16, 16, torch.int16, seed=1)]
    check_compaction(
        caches, distinct_tables(rng, 4, 3, 12), [3, 7, 2], [0b1001, 0b10101, 0b110001],
        device, mapping=[2, -1, 0],
    )  # fmt: skip


def test_mixed_layouts_and_shared_layers(device):
    """Layers of two layouts need two launches; a layer that occurs twice moves once."""
    first = make_cache("block-slot-head", 6, 2, 16, 8, torch.int16, seed=1)
    other = make_cache("block-head-slot", 6, 4, 16, 10, torch.int16, seed=2)
    moved = [to_device(first, device), to_device(other, device)]
    compactor = KVCompactor([moved[0], moved[1], moved[0]])
    twin = [first.clone(), other.clone()]
    twin_compactor = reference.KVCompactor([twin[0], twin[1], twin[0]])
    for run, where in ((compactor, device), (twin_compactor, "cpu")):
        run(
            torch.tensor([[4, 1, 3]], dtype=torch.int32, device=where),
            torch.zeros(1, dtype=torch.int64, device=where),
            torch.tensor([9], device=where),
            torch.tensor([0b1101001], device=where),
            num_reqs=1,
        )
    for got, want in zip(moved, twin, strict=True):
        assert torch.equal(as_bytes(got), as_bytes(want))


def overlap_batch(seed, num_reqs, device, compactor):
    """One launch of `num_reqs` independent random overlaps in a cache of distinct words.

    Every second pair of seeds has trees of two words.  Cases are made and compared where they
    are moved: the host of a GPU would take longer over them than the kernel.
    """
    generator = torch.Generator(device).manual_seed(seed)
    place = {"device": device}
    block_size, num_words = (16, 32)[seed % 2], (1, 2)[seed // 2 % 2]
    num_rows = 64 * num_words
    blocks_each = num_rows // block_size + 1
    num_slots = blocks_each * block_size
    cache = torch.arange(num_reqs * num_slots * 4, dtype=torch.int32, **place)
    cache = cache.view(num_reqs * blocks_each, 1, block_size, 4)
    blocks = torch.randperm(cache.shape[0], generator=generator, **place)
    blocks = blocks.view(num_reqs, blocks_each)
    roots = torch.randint(block_size, (num_reqs,), generator=generator, **place)
    rows = torch.arange(num_rows, **place)
    share = torch.rand(num_reqs, 1, generator=generator, **place)
    accepted = torch.rand(num_reqs, num_rows, generator=generator, **place) < share
    accepted[:, 0] = True
    words = (accepted.long() << rows % 64).view(num_reqs, num_words, 64)
    moved = cache.clone()
    compactor([moved])(
        blocks.to(torch.int32), torch.arange(num_reqs, **place), roots, words.sum(2).squeeze(1)
    )

    # The definition: slot root + rank(b) holds what slot root + b held, other slots their own.
    targets = torch.where(accepted, roots[:, None] + accepted.cumsum(1) - 1, num_slots)
    sources = torch.arange(num_slots + 1, **place).repeat(num_reqs, 1)
    sources = sources.scatter(1, targets, roots[:, None] + rows)[:, :num_slots]
    slots = torch.arange(num_slots, **place)
    want = cache.clone()
    want[blocks[:, slots // block_size], 0, slots % block_size] = cache[
        blocks.gather(1, sources // block_size), 0, sources % block_size
    ]
    assert torch.equal(moved, want)


def test_random_overlaps_kernel(device):
    # The interpreter takes about 10 ms a request, a GPU next to nothing.
    num_reqs = 28 if device.type == "cpu" else 2500
    for seed in range(8):
        overlap_batch(seed, num_reqs, device, KVCompactor)


def test_random_overlaps_twin():
    for seed in range(12):
        overlap_batch(seed, 1000, torch.device("cpu"), reference.KVCompactor)


@pytest.mark.long
def test_a_million_random_overlaps_kernel(device, write_record):
    """Each against the definition, in seconds; under the interpreter 10^5 in about an hour.

    Most of them four rows a pass, as in large batches, the rest eight, as in small ones.
    """
    fewer = 1 if device.type == "cuda" else 10
    sizes = [num_reqs // fewer for num_reqs in [20_000] * 48 + [1000] * 40]
    for seed, num_reqs in enumerate(sizes):
        overlap_batch(seed, num_reqs, device, KVCompactor)
    record = {"benchmark": "kv_overlaps", "device": device.type, "launches": len(sizes)}
    write_record(f"{device.type}_kv_overlaps", record | {"bit_exact_cases": sum(sizes)})


@pytest.mark.long
def test_a_million_random_overlaps_twin():
    for seed in range(1000):
        overlap_batch(seed, 1000, torch.device("cpu"), reference.KVCompactor)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_reqs=st.integers(1, 8))
def test_any_overlap(device, seed, num_reqs):
    overlap_batch(seed, num_reqs, device, KVCompactor)
    overlap_batch(seed, 20 * num_reqs, torch.device("cpu"), reference.KVCompactor)


FLOAT8 = [torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("compactor", [KVCompactor, reference.KVCompactor], ids=["kernel", "twin"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT8, ids=lambda dtype: str(dtype).split(".")[1])
def test_float8_caches_move_bit_for_bit(device, compactor, layout, dtype):
    """Every byte, NaN patterns included, in rows of 8-byte words and of single bytes."""
    for row, block_size in ((256, 16), (80, 64), (33, 16)):
        bytes_before = make_cache(layout, 12, 2, block_size, row, torch.uint8, seed=row)
        moved = to_device(bytes_before, device)
        compactor([moved.view(dtype)])(
            torch.tensor([[4, 9, 1, 7, 0]], dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.tensor([block_size - 2], device=device),
            torch.tensor([0b10010110000001], device=device),
        )
        want = bytes_before.clone()
        table = torch.tensor([4, 9, 1, 7, 0])
        for target, source in enumerate([0, 7, 8, 10, 13]):
            to, at = block_size - 2 + target, block_size - 2 + source
            want[table[to // block_size], :, to % block_size] = bytes_before[
                table[at // block_size], :, at % block_size
            ]
        assert torch.equal(as_bytes(moved), as_bytes(want))


@pytest.mark.parametrize(("row", "offset", "alignment"), [(256, 0, 16), (256, 8, 8), (24, 0, 8)])
def test_sixteen_byte_loads_only_where_every_row_allows_them(row, offset, alignment):
    """Only the start of the memory or only the rows' distance is off by eight bytes."""
    cache = make_cache("block-slot-head", 4, 1, 16, row, torch.uint8, seed=0, offset=offset)
    assert cache.data_ptr() % 16 == offset
    (group,) = group_layers([cache])
    assert (group.word_bytes, group.alignment) == (8, alignment)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(sorted(LAYOUTS)),
    block_size=st.sampled_from([16, 32, 48, 64]),
    row=st.integers(1, 40),
    num_rows=st.integers(1, 128),
)
def test_any_layout_any_path(device, seed, layout, block_size, row, num_rows):
    rng = random.Random(seed)
    num_reqs = rng.randint(1, 3)
    blocks_each = 192 // block_size + 2
    cache = make_cache(
        layout, num_reqs * blocks_each, rng.randint(1, 3), block_size, row,
        rng.choice([torch.uint8, torch.int16, torch.int32]), seed=seed,
    )  # fmt: skip
    tables = distinct_tables(rng, num_reqs, blocks_each, cache.shape[0])
    roots = [rng.randrange(64) for _ in range(num_reqs)]
    masks = [random_path(rng, num_rows) for _ in range(num_reqs)]
    check_compaction([cache], tables, roots, masks, device, num_rows=num_rows)


def compact_arguments(cache, device):
    """Arguments of the raw launcher for one layer in the block-head-slot order."""
    return {
        "layer_ptrs": torch.tensor([cache.data_ptr()], device=device),
        "block_table": torch.tensor([[1, 2, 3, 0]], dtype=torch.int32, device=device),
        "idx_mapping": torch.zeros(1, dtype=torch.int64, device=device),
        "root_positions": torch.tensor([13], dtype=torch.int32, device=device),
        "path_masks": torch.tensor([0b10110101], device=device),
        "num_reqs": 1,
        "block_size": cache.shape[2],
        "block_stride": cache.stride(0),
        "slot_stride": cache.stride(2),
        "head_stride": cache.stride(1),
        "num_kv_heads": cache.shape[1],
        "row_elems": cache.shape[3],
        "dtype": cache.dtype,
    }


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_raw_launcher_equals_raw_twin(device, dtype):
    """The form by addresses, in units of any dtype; NaN payloads included."""
    kernel_cache, twin_cache = (
        make_cache("block-head-slot", 4, 2, 16, 6, dtype, seed=9) for _ in range(2)
    )
    on_device = kernel_cache.to(device)
    compact_kv(**compact_arguments(on_device, device))
    reference.compact_kv(**compact_arguments(twin_cache, "cpu"))
    assert torch.equal(as_bytes(on_device), as_bytes(twin_cache))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("layer_ptrs", torch.zeros(1, dtype=torch.int32)),
        ("block_table", torch.zeros(1, 4, dtype=torch.int64)),
        ("path_masks", torch.zeros(0, dtype=torch.int64)),
        ("path_masks", torch.zeros(1, 3, dtype=torch.int64)),
        # Made on the device: a copy there would be dense.
        ("path_masks", lambda device: torch.zeros(2, 4, dtype=torch.int64, device=device)[:, :2]),
        ("num_reqs", -1),
        ("row_elems", 0),
        ("dtype", torch.complex128),
        ("alignment", 4),
    ],
)
@pytest.mark.parametrize("compact", [compact_kv, reference.compact_kv], ids=["kernel", "twin"])
def test_bad_arguments_are_named(device, compact, name, bad):
    cache = make_cache("block-head-slot", 4, 2, 16, 6, torch.int16, seed=9).to(device)
    if callable(bad):
        bad = bad(device)
    elif isinstance(bad, torch.Tensor):
        bad = bad.to(device)
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        compact(**compact_arguments(cache, device) | {name: bad})


def test_bad_caches_are_named(device):
    good = torch.zeros(2, 1, 16, 8, device=device)
    for caches, message in (
        ([], "kv_caches: found an empty list"),
        ([good[0]], r"kv_caches\[0\]: found shape"),
        ([good.transpose(2, 3)], r"kv_caches\[0\]: found last stride"),
        ([good, good[:, :, :8]], r"kv_caches\[1\]: found block size 8"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCompactor(caches)
