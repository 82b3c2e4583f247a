"""scatter_tree: tree positions and masks of a step, exact."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import NAMED_TREES, cumulated, depths_of, mask_table, padded_rows, random_parents

from vllm_medusa.triton_kernels import reference, scatter_tree

POISON = -77


def make_inputs(trees, *, contexts, tree_rows, query_lens, idx_mapping, num_tree_reqs, width):
    """Linear positions from `contexts`; tables hold POISON wherever nothing may be read."""
    num_slots = max([*idx_mapping, 0]) + 2
    depth_rows, table_trees = [[POISON]] * num_slots, [None] * num_slots
    for idx, parents in zip(idx_mapping, trees, strict=False):
        if idx < 0:
            continue
        depth_rows[idx], table_trees[idx] = depths_of(parents), parents
    masks = mask_table(table_trees, width, POISON)
    positions = [c + i for c, n in zip(contexts, query_lens, strict=True) for i in range(n)]
    return {
        "positions": torch.tensor([*positions, POISON, POISON], dtype=torch.int64),
        "step_masks": torch.full((len(trees) + 1, *masks.shape[1:]), POISON, dtype=torch.int64),
        "query_start_loc": cumulated(query_lens),
        "cu_num_logits": cumulated(tree_rows),
        "idx_mapping": torch.tensor(idx_mapping, dtype=torch.int64),
        "depths": padded_rows(depth_rows, width, POISON, torch.int32),
        "masks": masks,
        "num_tree_reqs": num_tree_reqs,
    }


def run(scatter, inputs, device):
    arguments = {
        name: value.clone().to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    scatter(**arguments)
    return arguments["positions"].cpu(), arguments["step_masks"].cpu()


def both(inputs, device):
    got, want = run(scatter_tree, inputs, device), run(reference.scatter_tree, inputs, "cpu")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    return got


@pytest.mark.parametrize("name", NAMED_TREES)
def test_named_trees(device, name):
    parents = NAMED_TREES[name]
    num_rows = len(parents)
    inputs = make_inputs(
        [parents], contexts=[10], tree_rows=[num_rows], query_lens=[num_rows],
        idx_mapping=[1], num_tree_reqs=1, width=num_rows,
    )  # fmt: skip
    positions, step_masks = both(inputs, device)
    assert positions[:num_rows].tolist() == [10 + depth for depth in depths_of(parents)]
    assert torch.equal(step_masks[0], mask_table([parents], num_rows, POISON)[0])
    assert (positions[num_rows:] == POISON).all()
    assert (step_masks[1:] == POISON).all()


@pytest.mark.parametrize("seed", range(20))
def test_random_batches_leave_other_requests_alone(device, seed):
    """Tree requests lead; those behind num_tree_reqs keep linear positions and old masks."""
    rng = random.Random(seed)
    num_reqs, num_tree_reqs = 6, rng.randrange(7)
    width = rng.choice([64, 65, 127, 128])
    trees = [random_parents(rng, rng.randrange(width)) for _ in range(num_reqs)]
    tree_rows = [rng.randint(0, len(tree)) for tree in trees]
    query_lens = [n + rng.choice([0, 0, 3]) for n in tree_rows]
    inputs = make_inputs(
        trees, contexts=[rng.randrange(1000) for _ in trees], tree_rows=tree_rows,
        query_lens=query_lens, idx_mapping=rng.sample(range(9), num_reqs),
        num_tree_reqs=num_tree_reqs, width=width,
    )  # fmt: skip
    positions, step_masks = both(inputs, device)
    ends = inputs["query_start_loc"].tolist()
    for r in range(num_tree_reqs):
        root = ends[r + 1] - tree_rows[r]
        assert torch.equal(positions[ends[r] : root], inputs["positions"][ends[r] : root])
        depths = torch.tensor(depths_of(trees[r])[: tree_rows[r]], dtype=torch.int64)
        assert torch.equal(positions[root : ends[r + 1]], inputs["positions"][root] + depths)
    untouched = slice(ends[num_tree_reqs], None)
    assert torch.equal(positions[untouched], inputs["positions"][untouched])
    assert (step_masks[num_tree_reqs:] == POISON).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 128), num_reqs=st.integers(1, 5))
def test_any_width(device, seed, width, num_reqs):
    """Positions and words of every tree row, by the definition; all else as it was."""
    rng = random.Random(seed)
    trees = [random_parents(rng, rng.randrange(width)) for _ in range(num_reqs)]
    tree_rows = [rng.randint(0, len(tree)) for tree in trees]
    query_lens = [n + rng.choice([0, 2]) for n in tree_rows]
    inputs = make_inputs(
        trees, contexts=[rng.randrange(2**31, 2**32) for _ in trees], tree_rows=tree_rows,
        query_lens=query_lens, idx_mapping=rng.sample(range(-1, num_reqs + 1), num_reqs),
        num_tree_reqs=num_reqs, width=width,
    )  # fmt: skip
    positions, step_masks = both(inputs, device)
    want, ends = inputs["positions"].clone(), inputs["query_start_loc"].tolist()
    for r, idx in enumerate(inputs["idx_mapping"].tolist()):
        if idx < 0:
            assert (step_masks[r] == POISON).all()
            continue
        assert torch.equal(step_masks[r], mask_table([trees[r]], width, POISON)[0])
        root = ends[r + 1] - tree_rows[r]
        depths = torch.tensor(depths_of(trees[r])[: tree_rows[r]], dtype=torch.int64)
        if tree_rows[r]:
            want[root : ends[r + 1]] = want[root] + depths
    assert torch.equal(positions, want)


def test_request_without_tree_slot_is_left_untouched(device):
    inputs = make_inputs(
        [[-1, 0, 0]], contexts=[4], tree_rows=[3], query_lens=[3], idx_mapping=[0],
        num_tree_reqs=1, width=3,
    )  # fmt: skip
    inputs["idx_mapping"][0] = -1
    positions, step_masks = both(inputs, device)
    assert positions.tolist() == [4, 5, 6, POISON, POISON]
    assert (step_masks == POISON).all()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("positions", torch.zeros(3, dtype=torch.int32)),
        ("depths", torch.zeros(2, 129, dtype=torch.int32)),
        ("masks", torch.zeros(2, 4, dtype=torch.int64)),
        ("step_masks", torch.zeros(0, 3, dtype=torch.int64)),
        ("idx_mapping", torch.zeros(1, dtype=torch.float32)),
        ("num_tree_reqs", -1),
    ],
)
@pytest.mark.parametrize("scatter", [scatter_tree, reference.scatter_tree], ids=["kernel", "twin"])
def test_bad_arguments_are_named(device, scatter, name, bad):
    inputs = make_inputs(
        [[-1, 0, 0]], contexts=[4], tree_rows=[3], query_lens=[3], idx_mapping=[0],
        num_tree_reqs=1, width=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        run(scatter, inputs | {name: bad}, device)
