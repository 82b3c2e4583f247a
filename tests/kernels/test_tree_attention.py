"""tree_attention: against the float64 twin, the twin against the definition."""

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    Case,
    attention_by_definition,
    attention_over_context,
    build,
    in_float64,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NAMED_TREES, random_parents

from vllm_medusa.triton_kernels import add_tree_attention, attention, reference, tree_attention
from vllm_medusa.triton_kernels.attention_plan import plan_attention, workspace_elements
from vllm_medusa.triton_kernels.repeated_launch import RepeatedLaunch

# Largest absolute error against float64 arithmetic on the same (rounded) inputs; values are
# standard normal, so outputs are at most about 4.
TOLERANCES = {
    # A dot of 256 products and a softmax whose logits carry 1e-6; the soft-cap's tanh adds
    # cap * 2^-23, 6e-6 at 50.
    torch.float32: 3e-5,
    # Weights and output are rounded to 11 and 8 bits: 4 * 2^-11 and 4 * 2^-8, and a little more
    # for the weights' part.
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
TWIN_TOLERANCE = 1e-12  # float64 against float64, different order of summation


def tree(name):
    return tuple(NAMED_TREES[name])


def check(case, device, **overrides):
    """Kernel against the float64 twin; own rows all written, other rows untouched."""
    if device.type == "cpu" and case.dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 as integers")
    arguments = build(case, device)
    exact = in_float64(arguments)
    reference.tree_attention(**exact)
    tree_attention(**arguments | overrides)
    got, want = arguments["out"].cpu().double(), exact["out"]
    num_rows = sum(case.query_lens)
    assert not want[:num_rows].isnan().any()
    assert not got[:num_rows].isnan().any(), "a row of the batch was not written, or became NaN"
    assert got[num_rows:].isnan().all(), "a row that belongs to nobody was written"
    error = (got - want)[:num_rows].abs().max().item() if num_rows else 0.0
    assert error <= TOLERANCES[case.dtype], error
    return arguments


DEFINITION_CASES = {
    "plain": Case((tree("random-15"), None, tree("root-only")), (17, 0, 0)),
    "window-in-tree": Case((tree("chain-5"), tree("random-16")), (3, 40), window=4),
    "window-in-context": Case((tree("random-15"),), (90,), window=33, block_size=32),
    "soft-cap-and-sinks": Case((tree("random-16"),), (20,), soft_cap=2.0, sinks=True),
    "scales": Case((tree("random-15"),), (9,), scales=2),
}


@pytest.mark.parametrize("name", DEFINITION_CASES)
def test_twin_follows_the_definition(name):
    case = DEFINITION_CASES[name]
    arguments = build(case, torch.device("cpu"))
    exact = in_float64(arguments)
    reference.tree_attention(**exact)
    num_rows = sum(case.query_lens)
    want = attention_by_definition(case, arguments)
    assert (exact["out"] - want)[:num_rows].abs().max() <= TWIN_TOLERANCE
    assert exact["out"][num_rows:].isnan().all()


@pytest.mark.parametrize("name", DEFINITION_CASES)
def test_kernel_on_the_cases_of_the_definition(device, name):
    check(DEFINITION_CASES[name], device)


@pytest.mark.parametrize("name", NAMED_TREES)
def test_named_trees(device, name):
    check(Case((tree(name),), (37,), kv_heads=1), device)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("context", [0, 1, "block-1", "block", "block+1"])
def test_contexts_around_a_page(device, block_size, context):
    """The tree starts at every position that matters in a page and straddles the next."""
    offsets = {"block-1": block_size - 1, "block": block_size, "block+1": block_size + 1}
    context = offsets.get(context, context)
    check(Case((tree("random-30"),), (context,), kv_heads=1, block_size=block_size), device)


@pytest.mark.parametrize("num_splits", [1, 4, None])
def test_long_context(device, num_splits):
    check(Case((tree("random-63"),), (1000,), kv_heads=1, num_splits=num_splits), device)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_ragged_batch_with_padded_requests(device, num_splits):
    case = Case(
        (tree("random-16"), None, tree("root-only"), tree("full-63"), tree("one-node"), None),
        (130, 0, 300, 5, 64, 0), num_splits=num_splits,
    )  # fmt: skip
    check(case, device)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_one_to_128_rows_in_one_launch(device, num_splits):
    """Masks of two words; trees of one row, one word and two, some across three pages."""
    names = ("random-64", None, "root-only", "full-127", "random-63", "random-126", "one-node")
    case = Case(
        tuple(name and tree(name) for name in names), (60, 0, 300, 5, 63, 130, 17),
        group=3, dtype=torch.float16, num_splits=num_splits,
    )  # fmt: skip
    check(case, device)


@pytest.mark.parametrize("context", [0, 1, 63, 64, 65])
def test_second_word_around_a_tile(device, context):
    """Row 64 is the last, the first or the second key of a tile of 64 keys."""
    check(Case((tree("random-126"),), (context,), kv_heads=1, dtype=torch.float16), device)


@pytest.mark.parametrize("window", [1, 3, 40, 127, 130])
def test_sliding_windows_over_two_words(device, window):
    case = Case((tree("chain-127"), tree("random-126")), (50, 100), kv_heads=1, window=window)
    check(case, device)


def test_few_rows_of_a_table_for_many(device):
    """At most 64 rows are served from the first words alone, whatever stands in the second."""
    case = Case((tree("full-63"), tree("random-15")), (40, 3), kv_heads=1)
    masks = build(case, device)["tree_masks"]
    table = torch.full((2, 2, 128), -77, dtype=torch.int64, device=device)
    table[:, 0, :64] = masks
    check(case, device, tree_masks=table)


def test_only_padded_requests_write_nothing(device):
    check(Case((None, None), (0, 0)), device)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("name", ["root-only", "random-30", "full-63"])
def test_query_groups(device, group, name):
    """From one padded row tile to four tiles of 32 pairs and more."""
    check(Case((tree(name), tree("random-15")), (21, 70), kv_heads=2, group=group), device)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_head_sizes(device, head_size, num_splits):
    case = Case((tree("random-15"),), (200,), kv_heads=2, head_size=head_size,
                num_splits=num_splits)  # fmt: skip
    check(case, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_half_precisions(device, dtype, head_size):
    case = Case((tree("random-30"), tree("random-16")), (100, 33), kv_heads=1, group=4,
                head_size=head_size, dtype=dtype)  # fmt: skip
    check(case, device)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("cache_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales", [0, 1, 2])
def test_float8_caches(device, cache_dtype, dtype, scales):
    case = Case((tree("random-16"),), (70,), dtype=dtype, cache_dtype=cache_dtype, scales=scales)
    check(case, device)


@pytest.mark.parametrize("query_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_float8_queries(device, query_dtype, dtype, num_splits):
    """What vLLM passes with a float8 cache; every head with factors of its own."""
    case = Case(
        (tree("random-16"), tree("full-127")), (70, 300), dtype=dtype, query_dtype=query_dtype,
        cache_dtype=torch.float8_e4m3fn, scales=2, num_splits=num_splits,
    )  # fmt: skip
    check(case, device)


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_both_orders_of_the_cache(device, head_first, num_splits):
    case = Case((tree("random-15"),), (150,), head_first=head_first, num_splits=num_splits)
    check(case, device)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 5, 16, 64, 65, 250, 1000])
def test_sliding_windows(device, window, num_splits):
    """Windows inside the tree, across its root, at tile edges, beyond everything.

    Pages before the window hold NaN, as freed pages may.
    """
    case = Case((tree("chain-5"), tree("random-63")), (200, 300), kv_heads=1, window=window,
                num_splits=num_splits)  # fmt: skip
    check(case, device)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("soft_cap", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_soft_cap_and_sinks(device, soft_cap, sinks, num_splits):
    case = Case((tree("random-16"),), (300,), kv_heads=1, group=3, soft_cap=soft_cap, sinks=sinks,
                num_splits=num_splits)  # fmt: skip
    check(case, device)


PART_CASES = {
    "root-only": Case((tree("root-only"),), (33,)),
    "full-63": Case((tree("full-63"),), (100,), group=4),
    "no-context": Case((tree("random-15"), tree("chain-5")), (0, 20)),
    "ragged": Case((tree("random-15"), None, tree("full-63"), tree("root-only")), (17, 0, 64, 1)),
    "in-one-page": Case((tree("random-16"),), (3,), block_size=128),
    "soft-cap-and-sinks": Case((tree("random-30"),), (50,), soft_cap=2.0, sinks=True, group=3),
    "head-size-80": Case((tree("random-30"),), (50,), head_size=80),
    "half": Case((tree("full-63"),), (70,), dtype=torch.float16, head_size=128),
    "float8": Case((tree("random-30"),), (50,), cache_dtype=torch.float8_e5m2, scales=1,
                   sinks=True),
    "float8-queries": Case((tree("full-63"), tree("one-node")), (70, 0), dtype=torch.float16,
                           cache_dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn,
                           scales=2),
    "two-words": Case((tree("full-127"), tree("one-node")), (70, 9), group=2),
    "two-words-half": Case((tree("random-126"), tree("random-64")), (33, 0), dtype=torch.float16),
}


@pytest.mark.parametrize("name", PART_CASES)
@pytest.mark.parametrize("add", [add_tree_attention, reference.add_tree_attention],
                         ids=["kernel", "twin"])  # fmt: skip
def test_tree_part_completes_attention_over_the_context(device, name, add):
    check_tree_part(PART_CASES[name], device, add)


def check_tree_part(case, device, add):
    """Context and tree apart are both at once; own rows all written, other rows untouched."""
    arguments = build(case, device)
    exact = in_float64(arguments)
    reference.tree_attention(**exact)
    context_out, lse = attention_over_context(arguments)
    arguments["out"].copy_(context_out)
    for unknown in ("sliding_window", "num_splits"):
        del arguments[unknown]
    add(lse=lse.float().contiguous().to(device), **arguments)
    num_rows = sum(case.query_lens)
    got, want = arguments["out"].cpu().double(), exact["out"]
    assert got[num_rows:].isnan().all(), "a row that belongs to nobody was written"
    error = (got - want)[:num_rows].abs().max().item() if num_rows else 0.0
    assert error <= TOLERANCES[case.dtype], error


def test_bounds_may_exceed_the_batch(device):
    """A captured graph is launched with upper bounds, more splits than keys included."""
    case = Case((tree("random-15"), tree("one-node")), (40, 3), kv_heads=1)
    width = torch.nn.functional.pad(build(case, device)["tree_masks"], (0, 48), value=-1)
    check(case, device, max_query_len=64, max_seq_len=4096, num_splits=16, tree_masks=width)


def test_splits_and_workspace_change_nothing_but_rounding(device):
    case = Case((tree("random-30"),), (700,), kv_heads=1)
    elements = workspace_elements(31 + 2, 2, 64, 5)
    workspace = torch.full((elements,), float("nan"), device=device)
    check(case, device, num_splits=5, workspace=workspace)
    with pytest.raises(ValueError, match=r"^workspace: found"):
        check(case, device, num_splits=5, workspace=workspace[1:])


@pytest.mark.parametrize(
    ("join_rows", "num_splits"),
    [(0, 9), (4, 9), (8, 2), (16, 12)],
    ids=["last-program", "own-kernel", "fewer-splits-than-in-flight", "splits-without-keys"],
)
def test_who_joins_the_splits_does_not_matter(device, join_rows, num_splits):
    case = Case((tree("random-30"), None, tree("root-only")), (500, 0, 3), kv_heads=1, group=3,
                sinks=True, scales=1)  # fmt: skip
    plan = plan_attention(
        num_reqs=3, num_kv_heads=1, group=3, head_size=64, item_size=4, max_query_len=31,
        max_seq_len=531, num_multiprocessors=132, num_splits=num_splits,
    )  # fmt: skip
    check(case, device, plan=replace(plan, join_rows=join_rows))


@pytest.mark.parametrize("join_rows", [0, 8], ids=["one-kernel", "two-kernels"])
def test_later_layers_repeat_the_launch_of_the_first(device, join_rows, monkeypatch):
    """With their own queries, sinks and outputs, in any alignment but of equal strides."""
    case = Case((tree("random-30"), None, tree("root-only")), (500, 0, 3), kv_heads=1, group=3,
                sinks=True, dtype=torch.float16)  # fmt: skip
    plan = plan_attention(
        num_reqs=3, num_kv_heads=1, group=3, head_size=64, item_size=2, max_query_len=31,
        max_seq_len=531, num_multiprocessors=132, num_splits=5,
    )  # fmt: skip
    launches, layer = {}, build(case, device)
    tree_attention(**layer, plan=replace(plan, join_rows=join_rows), launches=launches)
    assert [len(kept) for kept in launches.values()] == [1 if join_rows == 0 else 2]
    monkeypatch.setattr(attention, "launch", None)
    # The next layer: the batch is the same, its tensors are not.
    for name in ("out", "q", "sinks"):
        room = layer[name].new_empty(1 + layer[name].untyped_storage().nbytes())
        # As many bytes apart, and not where 16 bytes begin.
        moved = room[1:].as_strided(layer[name].shape, layer[name].stride())
        layer[name] = moved.copy_(layer[name]).mul_(-0.5)
    exact = in_float64(layer)
    reference.tree_attention(**exact)
    tree_attention(**layer, plan=replace(plan, join_rows=join_rows), launches=launches)
    rows = sum(case.query_lens)
    error = (layer["out"].cpu().double() - exact["out"])[:rows].abs().max().item()
    assert error <= TOLERANCES[case.dtype], error


def test_repeated_launch_keeps_order_and_moves_what_it_knows():
    ran = []
    kernel = {(2, 3): lambda *values, **options: ran.append((values, options))}
    kernel = type("Kernel", (dict,), {"arg_names": ["out", "count", "SIZE"]})(kernel)
    repeat = RepeatedLaunch(kernel, (2, 3), {"SIZE": 4, "out": "a", "count": 5}, {"num_warps": 1})
    repeat(out="b", sinks=None)
    repeat()
    assert ran == [(("b", 5, 4), {"num_warps": 1})] * 2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_batch(device, seed):
    rng = random.Random(seed)
    num_reqs = rng.randint(1, 3)
    trees = tuple(
        tuple(random_parents(rng, rng.choice([0, 1, 7, 20, 63]))) if rng.random() < 0.85 else None
        for _ in range(num_reqs)
    )
    if rng.random() < 0.1:
        trees = (tuple(random_parents(rng, rng.randint(64, 127))), *trees[:1])
    check(
        Case(
            trees, tuple(rng.choice([0, rng.randint(1, 200)]) for _ in trees),
            kv_heads=rng.randint(1, 2),
            group=rng.randint(1, 3), head_size=rng.choice([16, 64]),
            block_size=rng.choice([16, 48, 64]), head_first=rng.random() < 0.5,
            window=rng.choice([0, 0, 3, 70]), soft_cap=rng.choice([0.0, 20.0]),
            sinks=rng.random() < 0.3, num_splits=rng.choice([1, 2]), seed=seed % 1000,
        ),
        device,
    )  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_tree_part(device, seed):
    rng = random.Random(seed)
    trees = [
        tuple(random_parents(rng, rng.choice([0, 3, 15, 40, 63, 64, 100])))
        if rng.random() < 0.85 else None
        for _ in range(rng.randint(1, 2))
    ]  # fmt: skip
    float8 = rng.random() < 0.3
    case = Case(
        tuple(trees), tuple(rng.choice([0, rng.randint(1, 150)]) for _ in trees),
        kv_heads=rng.randint(1, 2), group=rng.randint(1, 3), head_size=rng.choice([16, 64, 80]),
        block_size=rng.choice([16, 48, 64]), head_first=rng.random() < 0.5,
        dtype=rng.choice([torch.float32, torch.float16]), soft_cap=rng.choice([0.0, 20.0]),
        cache_dtype=torch.float8_e4m3fn if float8 else None, scales=int(float8),
        sinks=rng.random() < 0.3, seed=seed % 1000,
    )  # fmt: skip
    check_tree_part(case, device, add_tree_attention)


@pytest.mark.parametrize(("context", "num_splits"), [(32_768 - 17, 1), (32_768, 8)])
def test_context_of_32k(device, context, num_splits):
    """The last page before 32k and the first behind it."""
    case = Case((tree("random-15"),), (context,), kv_heads=1, group=1, head_size=16,
                dtype=torch.float16, num_splits=num_splits)  # fmt: skip
    check(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 4096])
def test_very_long_context(device, dtype, window):
    case = Case((tree("random-63"), tree("random-15")), (32_768, 20_001), kv_heads=8, group=4,
                head_size=128, dtype=dtype, window=window, num_splits=None)  # fmt: skip
    check(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 6])
def test_graph_replay_follows_device_sizes(device, num_splits):
    """Captured once with upper bounds, replayed after lengths, pages and masks changed."""
    small, large = (
        Case((tree(a), tree(b)), contexts, kv_heads=8, group=4, head_size=128,
             dtype=torch.bfloat16, num_splits=num_splits)
        for a, b, contexts in (
            ("random-15", "one-node", (20, 3)), ("full-63", "chain-63", (900, 77))
        )
    )  # fmt: skip
    arguments = build(large, device)
    tree_attention(**arguments)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree_attention(**arguments)
    for case in (small, large):
        new = build(case, device)
        want = in_float64(new)
        reference.tree_attention(**want)
        num_rows = sum(case.query_lens)
        arguments["out"].fill_(float("nan"))
        for name in ("q", "k_cache", "v_cache", "block_table", "query_start_loc", "seq_lens",
                     "tree_masks"):  # fmt: skip
            target = arguments[name]
            target[tuple(slice(n) for n in new[name].shape)] = new[name]
        graph.replay()
        got = arguments["out"].cpu().double()
        error = (got[:num_rows] - want["out"][:num_rows]).abs().max()
        assert error <= TOLERANCES[case.dtype]
        assert got[num_rows:].isnan().all()


def test_plan_fills_the_device_and_stays_within_limits():
    shape = {"num_kv_heads": 8, "group": 4, "head_size": 128, "item_size": 2,
             "max_query_len": 64, "num_multiprocessors": 132}  # fmt: skip
    assert plan_attention(num_reqs=1, max_seq_len=8192, **shape).num_splits == 8
    assert plan_attention(num_reqs=1, max_seq_len=2048, **shape).num_splits == 4
    assert plan_attention(num_reqs=4, max_seq_len=8192, **shape).num_splits == 2
    eight = plan_attention(num_reqs=8, max_seq_len=8192, **shape)
    assert (eight.block_rows, eight.num_warps, eight.num_splits) == (128, 8, 1)
    assert plan_attention(num_reqs=32, max_seq_len=8192, **shape).num_splits == 1
    assert plan_attention(num_reqs=1, max_seq_len=64, **shape).num_splits == 1
    assert plan_attention(num_reqs=32, max_seq_len=8192, **shape).row_tiles == 1
    assert plan_attention(num_reqs=1, max_seq_len=64, num_splits=7, **shape).num_splits == 7
    with pytest.raises(ValueError, match=r"^num_splits: found 0"):
        plan_attention(num_reqs=1, max_seq_len=64, num_splits=0, **shape)


def test_tiles_of_mixed_batches_fit_their_usual_tree():
    """The widest has 64 rows; of 256 requests and 576 rows the usual one has 3, of 32 it has 18."""
    shape = {"num_kv_heads": 8, "group": 4, "head_size": 128, "item_size": 2,
             "max_query_len": 64, "max_seq_len": 2048, "num_multiprocessors": 132}  # fmt: skip
    narrow = plan_attention(num_reqs=256, num_tokens=576, **shape)
    assert (narrow.block_rows, narrow.row_tiles, narrow.num_splits) == (64, 4, 1)
    middle = plan_attention(num_reqs=32, num_tokens=576, **shape)
    assert (middle.block_rows, middle.row_tiles) == (128, 2)
    wide = plan_attention(num_reqs=32, num_tokens=32 * 64, **shape)
    assert wide == plan_attention(num_reqs=32, **shape) and wide.row_tiles == 1


BAD_ARGUMENTS = [
    ("q", lambda a: a["q"].transpose(0, 1)),
    ("q", lambda a: a["q"].to(torch.int32)),
    ("out", lambda a: a["out"][:, :1]),
    ("k_cache", lambda a: a["k_cache"].to(torch.float16)),
    ("v_cache", lambda a: a["v_cache"].contiguous()),
    ("block_table", lambda a: a["block_table"].long()),
    ("query_start_loc", lambda a: a["query_start_loc"][:1]),
    ("seq_lens", lambda a: a["seq_lens"][:0]),
    ("tree_masks", lambda a: a["tree_masks"][:, :3]),
    ("tree_masks", lambda a: a["tree_masks"][:, None]),
    ("max_query_len", lambda _: 65),
    ("scale", lambda _: 0.0),
    ("sliding_window", lambda _: -1),
    ("sinks", lambda a: a["q"].new_zeros(3)),
    ("k_scale", lambda a: a["q"].new_zeros(3)),
    ("v_scale", lambda a: a["q"].new_zeros(1, dtype=torch.float16)),
    ("v_scale", lambda a: a["q"].new_ones(2)),  # while k_scale has one element
    ("q_scale", lambda a: a["q"].new_ones(2)),
    ("out", lambda a: a["out"].to(torch.float8_e4m3fn)),
]


def test_more_than_128_rows_are_named(device):
    arguments = build(DEFINITION_CASES["plain"], device)
    masks = torch.ones(3, 2, 129, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^max_query_len: found 129, expected at most 128"):
        tree_attention(**arguments | {"tree_masks": masks, "max_query_len": 129})


@pytest.mark.parametrize(("name", "damage"), BAD_ARGUMENTS)
@pytest.mark.parametrize("attend", [tree_attention, reference.tree_attention],
                         ids=["kernel", "twin"])  # fmt: skip
def test_bad_arguments_are_named(device, attend, name, damage):
    arguments = build(replace(DEFINITION_CASES["plain"], sinks=True, scales=1), device)
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        attend(**arguments | {name: damage(arguments)})
