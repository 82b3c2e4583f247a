"""tree_walk: the accepted path of every request, against the twin and against its definition."""

import random
import re
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
    signed_words,
    star_parents,
)

from vllm_medusa.triton_kernels import reference, tree_walk
from vllm_medusa.triton_kernels.walk_types import RequestState, WalkOutput

POISON = -77  # no test expects this value anywhere
MAX_LEN = 164  # of a request's token history


def make_inputs(trees, drafts, sampled, limits, idx_mapping=None, width=None):
    """Argument dict for one batch; trees[r] are parents, drafts[r][0] is the root's.

    Roots sit behind a prompt of 10 tokens, at position 12.
    """
    width = width or max(map(len, trees))
    num_reqs = len(trees)
    idx_mapping = list(range(num_reqs)) if idx_mapping is None else idx_mapping
    num_slots = max([*idx_mapping, 0]) + 1
    table = [[POISON]] * num_slots
    for idx, parents in zip(idx_mapping, trees, strict=True):
        if idx >= 0:
            table[idx] = parents
    rows = [len(row) for row in sampled]
    return {
        "sampled": torch.tensor([t for row in sampled for t in row], dtype=torch.int64),
        "draft_tokens": torch.tensor([t for row in drafts for t in row], dtype=torch.int64),
        "positions": torch.tensor([12 + j for n in rows for j in range(n)], dtype=torch.int64),
        "cu_num_logits": cumulated(rows),
        "seq_lens": torch.tensor([12 + n for n in rows], dtype=torch.int32),
        "parents": padded_rows(table, width, POISON, torch.int32),
        "idx_mapping": torch.tensor(idx_mapping, dtype=torch.int64),
        "accept_limits": torch.tensor(limits, dtype=torch.int32),
        "prefill_len": torch.full((num_slots,), 10, dtype=torch.int32),
    }


def poisoned_output(inputs, columns=None, hidden_size=None, dtype=torch.float32):
    """A WalkOutput on the CPU that holds POISON everywhere."""
    num_reqs, num_logits = inputs["idx_mapping"].shape[0], inputs["sampled"].shape[0]
    out = WalkOutput.empty(
        num_reqs, num_logits, columns or inputs["parents"].shape[1], torch.device("cpu"),
        num_rows=inputs["parents"].shape[1],
    )  # fmt: skip
    for tensor in out:
        if tensor is not None:
            tensor.fill_(POISON)
    if hidden_size:
        out = out._replace(hidden=torch.full((num_reqs, hidden_size), POISON, dtype=dtype))
    return out


def run(walk, inputs, device, **out_options):
    """Every output on the CPU, the request state included if there is one."""
    on = {name: move(value, device) for name, value in inputs.items()}
    out = move(poisoned_output(inputs, **out_options), device)
    walk(out, **on)
    state = on.get("state") or ()
    found = {**out._asdict(), **(state._asdict() if state else {})}
    return {name: t.cpu() for name, t in found.items() if t is not None}


def move(value, device):
    """Copies on `device`, of tensors and of named groups of them."""
    if isinstance(value, tuple):
        return type(value)(*(move(tensor, device) for tensor in value))
    return value if value is None else value.clone().to(device)


def both(inputs, device, **out_options):
    """The kernel's outputs, after asserting that the twin's are the same to the bit."""
    got = run(tree_walk, inputs, device, **out_options)
    want = run(reference.tree_walk, inputs, "cpu", **out_options)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    return got


def test_worked_example(device):
    inputs = make_inputs([[-1, 0, 0, 2]], [[0, 7, 8, 9]], [[8, 1, 9, 5]], [3])
    got = both(inputs, device)
    assert got["tokens"].tolist() == [[8, 9, 5, 0b1101]]
    assert got["num_sampled"].tolist() == [3]
    assert got["path_masks"].tolist() == [0b1101]
    assert got["num_rejected"].tolist() == [1]
    assert got["root_positions"].tolist() == [12]
    assert got["last_rows"].tolist() == [3]
    assert got["flat_rows"].tolist() == [0, 2, 3, 3]


def test_first_of_equal_children_is_taken(device):
    inputs = make_inputs([[-1, 0, 0, 1, 2]], [[0, 7, 7, 4, 5]], [[7, 5, 5, 1, 1]], [9])
    got = both(inputs, device)
    assert got["tokens"].tolist() == [[7, 5, -1, -1, 0b11]]


def test_negative_drafts_are_no_nodes(device):
    # The target cannot draw a negative token; even if it did, the row would not be taken.
    inputs = make_inputs([[-1, 0, 1]], [[-1, -1, 3]], [[-1, 3, 4]], [9])
    got = both(inputs, device)
    assert got["num_sampled"].tolist() == [1]


@pytest.mark.parametrize("limit", [0, 1, 5, 62, 63, 64])
def test_accept_limit_cuts_the_longest_chain(device, limit):
    inputs = make_inputs([chain_parents(63)], [list(range(64))], [list(range(1, 65))], [limit])
    got = both(inputs, device)
    accepted = min(limit, 63)
    tokens = list(range(1, accepted + 2))
    assert got["num_sampled"].tolist() == [accepted + 1]
    assert got["tokens"][0, : accepted + 1].tolist() == tokens
    mask = (1 << accepted + 1) - 1
    assert got["path_masks"].item() & (1 << 64) - 1 == mask
    if accepted < 63:
        assert got["tokens"][0, 63].item() == mask
    assert got["flat_rows"].tolist() == list(range(64))


@pytest.mark.parametrize("limit", [0, 62, 63, 64, 125, 126, 127])
def test_path_masks_of_two_words(device, limit):
    """In the last two columns for as long as no token needs them."""
    inputs = make_inputs([chain_parents(127)], [list(range(128))], [list(range(1, 129))], [limit])
    got = both(inputs, device)
    mask = (1 << limit + 1) - 1
    words = signed_words(mask, 2)
    assert got["num_sampled"].tolist() == [limit + 1]
    assert got["path_masks"].tolist() == [words]
    tokens = list(range(1, limit + 2))
    packed = words if limit <= 125 else []
    behind = [-1] * (128 - len(tokens) - len(packed))
    assert got["tokens"].tolist() == [tokens + behind + packed]


def test_rows_of_both_words_on_one_path(device):
    """Root, row 63, row 64, row 127: the last bit of either word among them."""
    parents = star_parents(127)
    parents[64], parents[127] = 63, 64
    sampled = [500] * 128
    sampled[0], sampled[63], sampled[64] = 63, 64, 127
    inputs = make_inputs([parents] * 2, [list(range(128))] * 2, [sampled] * 2, [9, 2])
    got = both(inputs, device)
    assert got["path_masks"].tolist() == [[1 - 2**63, 1 - 2**63], [1 - 2**63, 1]]
    assert got["tokens"][0, :4].tolist() == [63, 64, 127, 500]
    assert got["tokens"][:, -2:].tolist() == got["path_masks"].tolist()
    assert got["last_rows"].tolist() == [127, 128 + 64]


def test_last_row_sets_the_sign_bit(device):
    inputs = make_inputs([star_parents(63)], [list(range(64))], [[63] * 64], [4])
    got = both(inputs, device)
    assert got["path_masks"].item() == 1 - (1 << 63)
    assert got["last_rows"].item() == 63


def test_unused_rows_of_mapping_padding_and_columns(device):
    """Requests in any order, one without a tree, one without rows, fewer columns than W."""
    trees = [[-1, 0], [-1, 0], [-1], [-1, 0]]
    drafts = [[0, 5], [0, 5], [], [0, 5]]
    sampled = [[5, 6], [5, 6], [], [5, 6]]
    inputs = make_inputs(trees, drafts, sampled, [9] * 4, idx_mapping=[4, -1, 0, 2], width=20)
    got = both(inputs, device, columns=3)
    assert got["num_sampled"].tolist() == [2, 1, 0, 2]
    assert got["tokens"].tolist() == [[5, 6, 3], [5, -1, 1], [-1, -1, 0], [5, 6, 3]]
    assert got["last_rows"].tolist() == [1, 2, 4, 5]


def test_fewer_rows_than_tree(device):
    """A request cut to its first rows must not step into rows of the next request."""
    inputs = make_inputs([[-1, 0, 1, 2]] * 2, [[0, 1], [2, 3]], [[1, 2], [3, 4]], [9, 9])
    got = both(inputs, device)
    assert got["num_sampled"].tolist() == [2, 2]
    assert got["path_masks"].tolist() == [3, 3]


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
    inputs = make_inputs([parents] * len(goals), drafts, sampled, [128] * len(goals))
    got = both(inputs, device)
    assert got["last_rows"].tolist() == [r * num_rows + g for r, g in enumerate(goals)]
    lengths = [len(ancestors_of(parents, goal)) for goal in goals]
    assert got["num_sampled"].tolist() == lengths


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(1, 6), num_reqs=st.integers(1, 5))
def test_random_batches(device, seed, vocab, num_reqs):
    rng = random.Random(seed)
    most = rng.choice([63, 127])
    trees = [random_parents(rng, rng.randint(0, most)) for _ in range(num_reqs)]
    rows = [rng.randint(1, len(tree)) for tree in trees]
    drafts = [[rng.randint(-1, vocab) for _ in range(n)] for n in rows]
    sampled = [[rng.randint(0, vocab) for _ in range(n)] for n in rows]
    limits = [rng.choice([0, 1, 2, 63]) for _ in range(num_reqs)]
    mapping = rng.sample(range(num_reqs + 2), num_reqs)
    inputs = make_inputs(trees, drafts, sampled, limits, idx_mapping=mapping)
    if rng.random() < 0.5:
        inputs["draft_tokens"] = inputs["draft_tokens"].to(torch.int32)
    if rng.random() < 0.5:
        inputs["state"] = random_state(rng, inputs["parents"].shape[0], vocab + 1)
    got = both(inputs, device)
    for r in range(num_reqs):
        path = reference.path_rows(got["path_masks"][r].tolist())
        start = inputs["cu_num_logits"][r].item()
        assert path == ancestors_of(trees[r], path[-1])
        assert [drafts[r][b] for b in path[1:]] == [sampled[r][b] for b in path[:-1]]
        assert got["tokens"][r, : len(path)].tolist() == [sampled[r][b] for b in path]
        assert got["last_rows"][r].item() == start + path[-1]
        tail = [
            row for row in range(rows[r])
            if trees[r][row] == path[-1] and drafts[r][row] == sampled[r][path[-1]]
        ]  # fmt: skip
        assert not tail or len(path) - 1 == limits[r], "stopped although a child matched"


def random_state(rng, num_slots, vocab_size, counts=True):
    """Request slots with histories of different lengths."""
    lengths = torch.tensor([rng.randrange(MAX_LEN - 128) for _ in range(num_slots)])
    return RequestState(
        num_computed_tokens=lengths.to(torch.int32),
        last_sampled=torch.full((num_slots,), POISON, dtype=torch.int64),
        total_len=lengths.to(torch.int32) + 1,
        all_token_ids=torch.full((num_slots, MAX_LEN), POISON, dtype=torch.int32),
        output_counts=torch.ones(num_slots, vocab_size, dtype=torch.int32) if counts else None,
    )


def test_root_inside_the_prompt_accepts_nothing(device):
    """Placeholder drafts of a first decode; whole chunks of a prompt sample nothing at all."""
    inputs = make_inputs([[-1, 0]] * 3, [[0, 5]] * 3, [[5, 6]] * 3, [9] * 3)
    inputs["prefill_len"] = torch.tensor([12, 13, 15], dtype=torch.int32)
    got = both(inputs, device)
    assert got["num_sampled"].tolist() == [2, 1, 0]
    assert got["num_rejected"].tolist() == [0, 1, 0]
    assert got["path_masks"].tolist() == [3, 1, 1]


@pytest.mark.parametrize("counts", [True, False], ids=["counts", "no-counts"])
def test_state_advances_by_the_path(device, counts):
    """One token thrice on a path, a padded request, one that samples nothing."""
    parents = chain_parents(3)
    inputs = make_inputs(
        [parents] * 3, [[0, 2, 2, 5]] * 3, [[2, 2, 2, 1]] * 3, [9] * 3, idx_mapping=[3, -1, 1]
    )
    inputs["prefill_len"][1] = 17
    state = random_state(random.Random(0), 4, 6, counts)
    inputs["state"] = state
    got = both(inputs, device)
    length, computed = int(state.total_len[3]), int(state.num_computed_tokens[3])
    assert got["all_token_ids"][3, length : length + 4].tolist() == [2, 2, 2, POISON]
    assert got["total_len"][3] == length + 3
    assert got["num_computed_tokens"][3] == computed + 3
    assert got["last_sampled"].tolist() == [POISON, POISON, POISON, 2]
    assert got["num_computed_tokens"][1] == state.num_computed_tokens[1] + 4
    for name in ("total_len", "all_token_ids"):
        assert torch.equal(got[name][:3], getattr(state, name)[:3]), name
    if counts:
        assert got["output_counts"][3].tolist() == [1, 1, 4, 1, 1, 1]
        assert (got["output_counts"][:3] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1024, 1025, 2304])
def test_hidden_state_of_the_last_row(device, size, dtype):
    """Chunks of 1024: one, one and an element, two and a quarter; a request without rows."""
    sampled = [[1, 2, 9], [], [9, 9, 9]]
    inputs = make_inputs([[-1, 0, 1]] * 3, [[0, 1, 2], [], [0, 1, 2]], sampled, [9] * 3)
    hidden = torch.randn(6, size + 3).to(dtype)[:, :size]  # a strided view
    inputs["hidden_states"] = hidden
    got = both(inputs, device, hidden_size=size, dtype=dtype)
    assert torch.equal(got["hidden"][[0, 2]], hidden[[2, 3]])
    assert (got["hidden"][1] == 0).all()


def on_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Move a tensor; a strided one stays strided, which ``Tensor.to`` does not promise."""
    moved = tensor.to(device)
    return moved if tensor.is_contiguous() else torch.stack([moved, moved], 1)[:, 0]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("draft_tokens", torch.zeros(1, dtype=torch.int64)),
        ("draft_tokens", torch.zeros(4, dtype=torch.float32)),
        ("positions", torch.zeros(4, dtype=torch.int32)),
        ("cu_num_logits", torch.zeros(2, dtype=torch.int64)),
        ("seq_lens", torch.zeros(0, dtype=torch.int32)),
        ("parents", torch.zeros(1, 129, dtype=torch.int32)),
        ("out.path_masks", torch.zeros(1, 2, dtype=torch.int64)),
        ("parents", torch.zeros(4, dtype=torch.int32)),
        ("accept_limits", torch.zeros(0, dtype=torch.int32)),
        ("prefill_len", torch.zeros(1, dtype=torch.int64)),
        ("out.tokens", torch.zeros(1, 5, dtype=torch.int64)),
        ("out.num_rejected", torch.zeros(1, dtype=torch.int64)),
        ("out.flat_rows", torch.zeros(8, dtype=torch.int64)[::2]),
        ("out.hidden", torch.zeros(1, 8)),
        ("hidden_states", torch.zeros(4, 4, dtype=torch.float64)),
        ("state.total_len", torch.zeros(2, dtype=torch.int32)),
        ("state.all_token_ids", torch.zeros(1, 8, dtype=torch.int64)),
        ("state.output_counts", torch.zeros(1, dtype=torch.int32)),
    ],
)
@pytest.mark.parametrize("walk", [tree_walk, reference.tree_walk], ids=["kernel", "twin"])
def test_bad_arguments_are_named(device, walk, name, bad):
    inputs = make_inputs([[-1, 0, 0, 2]], [[0, 7, 8, 9]], [[8, 1, 9, 5]], [3])
    out = poisoned_output(inputs, hidden_size=4 if name == "hidden_states" else None)
    inputs["state"] = random_state(random.Random(0), 1, 10)
    group, _, field = name.rpartition(".")
    bad = on_device(bad, device)
    out, inputs = move(out, device), {key: move(value, device) for key, value in inputs.items()}
    if group == "out":
        out = out._replace(**{field: bad})
    elif group == "state":
        inputs["state"] = inputs["state"]._replace(**{field: bad})
    else:
        inputs[name] = bad
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: found .*, expected "):
        walk(out, **inputs)
