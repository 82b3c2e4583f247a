"""tree_walk: the accepted path of every request, against the twin and against its definition."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    NAMED_TREES,
    ancestors_of,
    chain_parents,
    cumulated,
    padded_rows,
    random_parents,
    star_parents,
)

from vllm_medusa.triton_kernels import reference, tree_walk

POISON = -77  # no test expects this value anywhere


def make_inputs(trees, drafts, sampled, limits, idx_mapping=None, width=None):
    """Argument dict for one batch; trees[r] are parents, drafts[r][0] is the root's."""
    width = width or max(map(len, trees))
    num_reqs = len(trees)
    idx_mapping = list(range(num_reqs)) if idx_mapping is None else idx_mapping
    table = [[POISON]] * (max([*idx_mapping, 0]) + 1)
    for idx, parents in zip(idx_mapping, trees, strict=True):
        if idx >= 0:
            table[idx] = parents
    num_logits = sum(map(len, sampled))
    return {
        "sampled": torch.tensor([t for row in sampled for t in row], dtype=torch.int64),
        "draft_tokens": torch.tensor([t for row in drafts for t in row], dtype=torch.int64),
        "cu_num_logits": cumulated([len(row) for row in sampled]),
        "parents": padded_rows(table, width, POISON, torch.int32),
        "idx_mapping": torch.tensor(idx_mapping, dtype=torch.int64),
        "accept_limits": torch.tensor(limits, dtype=torch.int32),
        "out_tokens": torch.full((num_reqs, width), POISON, dtype=torch.int64),
        "out_num_sampled": torch.full((num_reqs,), POISON, dtype=torch.int32),
        "out_path_masks": torch.full((num_reqs,), POISON, dtype=torch.int64),
        "out_last_rows": torch.full((num_reqs,), POISON, dtype=torch.int64),
        "out_flat_rows": torch.full((num_logits,), POISON, dtype=torch.int64),
    }


def run(walk, inputs, device):
    arguments = {name: tensor.clone().to(device) for name, tensor in inputs.items()}
    walk(**arguments)
    return {name: t.cpu() for name, t in arguments.items() if name.startswith("out_")}


def both(inputs, device):
    """The kernel's outputs, after asserting that the twin's are the same to the bit."""
    got, want = run(tree_walk, inputs, device), run(reference.tree_walk, inputs, "cpu")
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    return got


def test_worked_example(device):
    inputs = make_inputs([[-1, 0, 0, 2]], [[0, 7, 8, 9]], [[8, 1, 9, 5]], [3])
    got = both(inputs, device)
    assert got["out_tokens"].tolist() == [[8, 9, 5, 0b1101]]
    assert got["out_num_sampled"].tolist() == [3]
    assert got["out_path_masks"].tolist() == [0b1101]
    assert got["out_last_rows"].tolist() == [3]
    assert got["out_flat_rows"].tolist() == [0, 2, 3, 3]


def test_first_of_equal_children_is_taken(device):
    inputs = make_inputs([[-1, 0, 0, 1, 2]], [[0, 7, 7, 4, 5]], [[7, 5, 5, 1, 1]], [9])
    got = both(inputs, device)
    assert got["out_tokens"].tolist() == [[7, 5, -1, -1, 0b11]]


def test_negative_drafts_are_no_nodes(device):
    # The target cannot draw a negative token; even if it did, the row would not be taken.
    inputs = make_inputs([[-1, 0, 1]], [[-1, -1, 3]], [[-1, 3, 4]], [9])
    got = both(inputs, device)
    assert got["out_num_sampled"].tolist() == [1]


@pytest.mark.parametrize("limit", [0, 1, 5, 62, 63, 64])
def test_accept_limit_cuts_the_longest_chain(device, limit):
    inputs = make_inputs([chain_parents(63)], [list(range(64))], [list(range(1, 65))], [limit])
    got = both(inputs, device)
    accepted = min(limit, 63)
    tokens = list(range(1, accepted + 2))
    assert got["out_num_sampled"].tolist() == [accepted + 1]
    assert got["out_tokens"][0, : accepted + 1].tolist() == tokens
    mask = (1 << accepted + 1) - 1
    assert got["out_path_masks"].item() & (1 << 64) - 1 == mask
    if accepted < 63:
        assert got["out_tokens"][0, 63].item() == mask
    assert got["out_flat_rows"].tolist() == list(range(64))


def test_last_row_sets_the_sign_bit(device):
    inputs = make_inputs([star_parents(63)], [list(range(64))], [[63] * 64], [4])
    got = both(inputs, device)
    assert got["out_path_masks"].item() == 1 - (1 << 63)
    assert got["out_last_rows"].item() == 63


def test_unused_rows_of_mapping_padding_and_columns(device):
    """Requests in any order, one without a tree, one without rows, fewer columns than W."""
    trees = [[-1, 0], [-1, 0], [-1], [-1, 0]]
    drafts = [[0, 5], [0, 5], [], [0, 5]]
    sampled = [[5, 6], [5, 6], [], [5, 6]]
    inputs = make_inputs(trees, drafts, sampled, [9] * 4, idx_mapping=[4, -1, 0, 2], width=20)
    inputs["out_tokens"] = torch.full((4, 3), POISON, dtype=torch.int64)
    got = both(inputs, device)
    assert got["out_num_sampled"].tolist() == [2, 1, 0, 2]
    assert got["out_tokens"].tolist() == [[5, 6, 3], [5, -1, 1], [-1, -1, 0], [5, 6, 3]]
    assert got["out_last_rows"].tolist() == [1, 2, 4, 5]


def test_fewer_rows_than_tree(device):
    """A request cut to its first rows must not step into rows of the next request."""
    inputs = make_inputs([[-1, 0, 1, 2]] * 2, [[0, 1], [2, 3]], [[1, 2], [3, 4]], [9, 9])
    got = both(inputs, device)
    assert got["out_num_sampled"].tolist() == [2, 2]
    assert got["out_path_masks"].tolist() == [3, 3]


@pytest.mark.parametrize("name", NAMED_TREES)
def test_named_trees_walk_to_every_row(device, name):
    """Distinct drafts: draw exactly one path per request and expect that path."""
    parents = NAMED_TREES[name]
    num_rows = len(parents)
    goals = range(0, num_rows, 1 + num_rows // 24)
    sampled = []
    for goal in goals:
        row = [1000] * num_rows
        path = ancestors_of(parents, goal)
        for above, below in pairwise(path):
            row[above] = below
        sampled.append(row)
    drafts = [list(range(num_rows))] * len(goals)
    inputs = make_inputs([parents] * len(goals), drafts, sampled, [64] * len(goals))
    got = both(inputs, device)
    assert got["out_last_rows"].tolist() == [r * num_rows + g for r, g in enumerate(goals)]
    lengths = [len(ancestors_of(parents, goal)) for goal in goals]
    assert got["out_num_sampled"].tolist() == lengths


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(1, 6), num_reqs=st.integers(1, 5))
def test_random_batches(device, seed, vocab, num_reqs):
    rng = random.Random(seed)
    trees = [random_parents(rng, rng.randrange(64)) for _ in range(num_reqs)]
    rows = [rng.randint(1, len(tree)) for tree in trees]
    drafts = [[rng.randint(-1, vocab) for _ in range(n)] for n in rows]
    sampled = [[rng.randint(0, vocab) for _ in range(n)] for n in rows]
    limits = [rng.choice([0, 1, 2, 63]) for _ in range(num_reqs)]
    mapping = rng.sample(range(num_reqs + 2), num_reqs)
    inputs = make_inputs(trees, drafts, sampled, limits, idx_mapping=mapping)
    got = both(inputs, device)
    for r in range(num_reqs):
        path = reference.path_rows(got["out_path_masks"][r].item())
        start = inputs["cu_num_logits"][r].item()
        assert path == ancestors_of(trees[r], path[-1])
        assert [drafts[r][b] for b in path[1:]] == [sampled[r][b] for b in path[:-1]]
        assert got["out_tokens"][r, : len(path)].tolist() == [sampled[r][b] for b in path]
        assert got["out_last_rows"][r].item() == start + path[-1]
        tail = [
            row for row in range(rows[r])
            if trees[r][row] == path[-1] and drafts[r][row] == sampled[r][path[-1]]
        ]  # fmt: skip
        assert not tail or len(path) - 1 == limits[r], "stopped although a child matched"


def on_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Move a tensor; a strided one stays strided, which ``Tensor.to`` does not promise."""
    moved = tensor.to(device)
    return moved if tensor.is_contiguous() else torch.stack([moved, moved], 1)[:, 0]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("draft_tokens", torch.zeros(1, dtype=torch.int64)),
        ("draft_tokens", torch.zeros(4, dtype=torch.int32)),
        ("cu_num_logits", torch.zeros(2, dtype=torch.int64)),
        ("parents", torch.zeros(1, 65, dtype=torch.int32)),
        ("parents", torch.zeros(4, dtype=torch.int32)),
        ("out_tokens", torch.zeros(1, 5, dtype=torch.int64)),
        ("out_flat_rows", torch.zeros(8, dtype=torch.int64)[::2]),
    ],
)
@pytest.mark.parametrize("walk", [tree_walk, reference.tree_walk], ids=["kernel", "twin"])
def test_bad_arguments_are_named(device, walk, name, bad):
    inputs = make_inputs([[-1, 0, 0, 2]], [[0, 7, 8, 9]], [[8, 1, 9, 5]], [3])
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        walk(**{key: on_device(value, device) for key, value in (inputs | {name: bad}).items()})
