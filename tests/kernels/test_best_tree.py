"""best_tree: the n likeliest paths of all there are, exact against twin and enumeration."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import mask_table

from vllm_medusa.tree_candidates import candidate_paths, candidate_tables
from vllm_medusa.tree_search import best_first_paths
from vllm_medusa.triton_kernels import best_tree, reference
from vllm_medusa.triton_kernels.tree_types import Candidates, FixedTree, TreeTables

POISON = -77
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 62, 63]


def masks_of(parents):
    """Ancestor-or-self words of one tree."""
    return mask_table([parents], len(parents), 0)[0].tolist()


def likeliest(log_probs, num_nodes):
    """The definition: all paths of one request's [K, T] table in order, shorter ones first among
    equals, then those of lower ranks; log probabilities summed from the root in float32."""
    known = np.where(np.isnan(log_probs), -np.inf, np.minimum(log_probs, 0)).astype(np.float32)
    ranks = range(known.shape[1])
    costs = {}
    for depth in range(1, known.shape[0] + 1):
        for path in itertools.product(ranks, repeat=depth):
            above = costs[path[:-1]] if depth > 1 else np.float32(0)
            costs[path] = above - known[depth - 1, path[-1]]
    ordered = sorted(costs, key=lambda path: (costs[path], len(path), path))
    return ordered[:num_nodes]


def tree_rows(paths):
    """Parents, depths and masks of W rows."""
    rows = {(): 0} | {path: row for row, path in enumerate(paths, start=1)}
    parents = [-1, *(rows[path[:-1]] for path in paths)]
    return parents, [0, *map(len, paths)], masks_of(parents)


def arguments(log_probs, num_nodes, device, *, slots=None, fixed_slots=()):
    """Arguments for a batch [R, K, T]; by default request r lives in slot 2 r + 1."""
    num_reqs, num_heads, num_top = log_probs.shape
    slots = [2 * r + 1 for r in range(num_reqs)] if slots is None else slots
    num_slots, width = 2 * num_reqs + 2, num_nodes + 1
    paths = candidate_paths(num_nodes, [num_top] * num_heads)
    tables = candidate_tables(paths, num_heads, num_top)
    root = {"parents": -1, "depths": 0, "masks": 1}
    chain = list(range(-1, num_nodes))

    def table(name, dtype):
        made = torch.full((num_slots, width), POISON, dtype=dtype, device=device)
        made[:, 0] = root[name]
        return made

    def vector(values, dtype):
        return torch.tensor(values, dtype=dtype, device=device)

    int32 = torch.int32
    return {
        "out": torch.full((num_reqs + 1, num_nodes), POISON, dtype=torch.int64, device=device),
        "tables": TreeTables(
            table("parents", int32), table("depths", int32), table("masks", torch.int64)
        ),
        "tokens": 1000 + torch.arange(log_probs.numel(), device=device).view(log_probs.shape),
        "log_probs": log_probs.float().contiguous().to(device),
        "slots": vector(slots, torch.int64),
        "candidates": Candidates(*(torch.from_numpy(t).to(device) for t in tables)),
        # A chain of no real ranks: nobody asks whether it could be drafted.
        "fixed": FixedTree(
            vector([int(slot in fixed_slots) for slot in range(num_slots)], int32),
            vector([node % (num_heads * num_top) for node in range(num_nodes)], int32),
            vector(chain, int32),
            vector(list(range(width)), int32),
            vector(masks_of(chain), torch.int64),
        ),
    }


def run(choose, log_probs, num_nodes, device, **options):
    """What one call wrote: drafts and tables on the CPU."""
    given_to_it = arguments(log_probs, num_nodes, device, **options)
    choose(**given_to_it)
    assert (given_to_it["out"][-1] == POISON).all(), "a row behind the batch was written"
    return given_to_it["out"][:-1].cpu(), [table.cpu() for table in given_to_it["tables"]]


def both(log_probs, num_nodes, device, **options):
    """Kernel's results, equal to the twin's to the bit."""
    drafts, tables = run(best_tree, log_probs, num_nodes, device, **options)
    twin_drafts, twin_tables = run(reference.best_tree, log_probs, num_nodes, "cpu", **options)
    assert torch.equal(drafts, twin_drafts)
    assert all(torch.equal(a, b) for a, b in zip(tables, twin_tables, strict=True))
    return drafts, tables


def check(log_probs, num_nodes, device):
    """Kernel and twin against the definition; slots of other requests stay as they were."""
    drafts, tables = both(log_probs, num_nodes, device)
    num_top = log_probs.shape[2]
    for r, table in enumerate(log_probs.float().numpy()):
        paths = likeliest(table, num_nodes)
        first = 1000 + r * table.size
        assert drafts[r].tolist() == [
            first + (len(path) - 1) * num_top + path[-1] for path in paths
        ]
        for found, want in zip(tables, tree_rows(paths), strict=True):
            assert found[2 * r + 1].tolist() == want
        for found in tables:
            assert (found[2 * r, 1:] == POISON).all()


def log_softmax_table(shape, *, scale=3.0, seed=0, vocab=64):
    """Sorted log probabilities of random heads, [R, K, T]."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape[:2], vocab, generator=generator)
    return logits.log_softmax(-1).sort(-1, descending=True).values[..., : shape[2]]


def test_worked_example(device):
    log_probs = torch.tensor([[[-0.1, -2.4], [-0.7, -0.9]]])
    _, (parents, depths, masks) = both(log_probs, 3, device)
    assert parents[1].tolist() == [-1, 0, 1, 1]
    assert depths[1].tolist() == [0, 1, 2, 2]
    assert masks[1].tolist() == [0b1, 0b11, 0b111, 0b1011]


@pytest.mark.parametrize("num_nodes", SIZES)
def test_sizes_around_powers_of_two(device, num_nodes):
    check(log_softmax_table((2, 3, min(num_nodes, 8)), seed=num_nodes), num_nodes, device)


@pytest.mark.parametrize(("heads", "ranks"), [(1, 12), (2, 12), (3, 9), (4, 7), (5, 5)])
def test_heads(device, heads, ranks):
    check(log_softmax_table((2, heads, ranks), seed=heads), 12, device)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("uniform", [-1.0]),
        ("certain", [0.0]),
        ("impossible", [float("-inf")]),
        ("unknown", [float("nan")]),
        ("ties", [-1.0, -2.0, -3.0]),
        ("one-hot-and-ties", [0.0, float("-inf")]),
        ("all-kinds", [0.0, -0.0, -1.0, float("-inf"), float("nan"), -3.4e38]),
        ("above-zero-counts-as-zero", [0.5, -0.5, -1.0]),
    ],
)
def test_ties_take_shorter_paths_then_lower_ranks(device, name, values):
    rng = random.Random(name)
    order = {value: -value if value == value else float("inf") for value in values}
    rows = [sorted(rng.choices(values, k=6), key=order.__getitem__) for _ in range(9)]
    check(torch.tensor(rows).view(3, 3, 6), 16, device)


def test_one_hot_heads_make_a_chain(device):
    log_probs = torch.full((1, 4, 3), float("-inf"))
    log_probs[:, :, 0] = 0.0
    _, (parents, *_) = both(log_probs, 4, device)
    assert parents[1].tolist() == [-1, 0, 1, 2, 3]


def test_requests_of_one_batch_get_trees_of_their_own(device):
    log_probs = torch.full((2, 4, 8), float("-inf"))
    log_probs[0, :, 0] = 0.0  # certain: a chain
    log_probs[1, 0] = -2.0  # undecided: a star
    log_probs[1, 1:] = -9.0
    _, (parents, *_) = both(log_probs, 4, device)
    assert parents[[1, 3]].tolist() == [[-1, 0, 1, 2, 3], [-1, 0, 0, 0, 0]]


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_every_prefix_is_the_best_tree_of_its_size(device, heads):
    """What budgets cut off is always the least likely part."""
    log_probs = log_softmax_table((1, heads, 63 if heads == 1 else 10), seed=7)
    whole, tables = both(log_probs, 63, device)
    for num_nodes in SIZES:
        drafts, cut = both(log_probs, num_nodes, device)
        assert torch.equal(drafts[0], whole[0, :num_nodes])
        for small, large in zip(cut, tables, strict=True):
            assert torch.equal(small[1], large[1, : num_nodes + 1])
    parents = tables[0][1]
    assert (parents[1:] < torch.arange(1, 64)).all()


def test_fixed_slots_and_padding(device):
    """Slots 0 and 3 choose, slot 5 keeps its tree; the padding has no slot."""
    log_probs = log_softmax_table((4, 3, 5), seed=3)
    slots = [3, -1, 5, 0]
    drafts, tables = both(log_probs, 9, device, slots=slots, fixed_slots={5, 7})
    chain = tree_rows([(0,) * depth for depth in range(1, 10)])
    for r, slot in enumerate(slots):
        chooses = slot in (0, 3)
        paths = likeliest(log_probs[r].numpy(), 9)
        columns = [(len(path) - 1) * 5 + path[-1] for path in paths] if chooses else range(9)
        assert drafts[r].tolist() == [1000 + r * 15 + column for column in columns]
        if slot >= 0:
            for found, want in zip(tables, tree_rows(paths) if chooses else chain, strict=True):
                assert found[slot].tolist() == want
    for found in tables:
        assert (found[[1, 2, 4, 6, 7, 8, 9], 1:] == POISON).all()


def test_no_requests(device):
    drafts, _ = both(torch.zeros(0, 2, 3), 2, device)
    assert drafts.shape == (0, 2)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_nodes=st.integers(1, 40),
    heads=st.integers(1, 4),
    kind=st.sampled_from(["softmax", "ties"]),
)
def test_any_log_probabilities(device, seed, num_nodes, heads, kind):
    ranks = num_nodes if heads == 1 else min(num_nodes, 6)
    if kind == "softmax":
        log_probs = log_softmax_table((1, heads, ranks), scale=seed % 7 / 2, seed=seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        log_probs = -torch.randint(4, (1, heads, ranks), generator=generator).sort(-1).values / 3
    if len(candidate_paths(num_nodes, [ranks] * heads)) >= num_nodes:
        check(log_probs, num_nodes, device)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_nodes=st.integers(1, 63), heads=st.integers(2, 5))
def test_worth_as_much_as_best_first_search(device, seed, num_nodes, heads):
    """The search that calibration runs on accuracies, on a step's own probabilities."""
    log_probs = log_softmax_table((1, heads, 16), scale=1 + seed % 4, seed=seed)
    _, (parents, *_) = both(log_probs, num_nodes, device)
    table = log_probs[0].double().exp().tolist()
    drafts, _ = run(reference.best_tree, log_probs, num_nodes, "cpu")
    values = [1.0]
    for token, parent in zip(drafts[0].tolist(), parents[1, 1:].tolist(), strict=True):
        head, rank = divmod(token - 1000, 16)
        values.append(values[parent] * table[head][rank])
    best = 0.0
    for path in best_first_paths(table, num_nodes):
        value = 1.0
        for head, rank in enumerate(path):
            value *= table[head][rank]
        best += value
    assert sum(values[1:]) == pytest.approx(best, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [4, 5])
def test_large_batches_and_graph_replay(device, heads):
    """Replayed on new probabilities: every slot's tree, every time."""
    log_probs = log_softmax_table((64, heads, 16))
    given_to_it = arguments(log_probs, 63, device)
    best_tree(**given_to_it)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        best_tree(**given_to_it)
    for seed in range(20):
        log_probs = log_softmax_table((64, heads, 16), scale=1 + seed % 5, seed=seed)
        given_to_it["log_probs"].copy_(log_probs)
        graph.replay()
        drafts, tables = run(reference.best_tree, log_probs, 63, "cpu")
        assert torch.equal(given_to_it["out"][:-1].cpu(), drafts)
        for found, want in zip(given_to_it["tables"], tables, strict=True):
            assert torch.equal(found.cpu(), want)


def replaced(name, change):
    """A damaged copy of one argument, or of one field of it."""
    outer, _, inner = name.partition(".")

    def damage(good):
        if not inner:
            return {outer: change(good[outer])}
        return {outer: good[outer]._replace(**{inner: change(getattr(good[outer], inner))})}

    return damage


BAD_ARGUMENTS = [
    ("slots", lambda t: t.float()),
    ("out", lambda t: t[:1]),
    ("out", lambda t: t.int()),
    ("out", lambda t: t.repeat(1, 30)),
    ("tokens", lambda t: t.transpose(1, 2)),
    ("tokens", lambda t: t.int()),
    ("log_probs", lambda t: t.double()),
    ("log_probs", lambda t: t[:, :, :2]),
    ("tables.parents", lambda t: t.long()),
    ("tables.parents", lambda t: t[:, :2]),
    ("tables.depths", lambda t: t[:1]),
    ("tables.masks", lambda t: t.int()),
    ("candidates.columns", lambda t: t[:, :3]),
    ("candidates.columns", lambda t: t.repeat(1, 4096)),
    ("candidates.columns", lambda t: t[:1]),
    ("candidates.ancestors", lambda t: t[:, 1:]),
    ("fixed.slots", lambda t: t.bool()),
    ("fixed.columns", lambda t: t.long()),
    ("fixed.parents", lambda t: t[1:]),
    ("fixed.depths", lambda t: t[1:]),
    ("fixed.masks", lambda t: t.int()),
    ("scratch", lambda _: torch.zeros(3, dtype=torch.int32)),
]


@pytest.mark.parametrize(("name", "change"), BAD_ARGUMENTS)
@pytest.mark.parametrize("choose", [best_tree, reference.best_tree], ids=["kernel", "twin"])
def test_bad_arguments_are_named(device, choose, name, change):
    good = arguments(log_softmax_table((2, 2, 4)), 4, device) | {"scratch": None}
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        choose(**good | replaced(name, change)(good))
