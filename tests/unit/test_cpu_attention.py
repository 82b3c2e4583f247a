"""Tree attention on a CPU against a float64 loop, and vLLM's own rows beside it bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_attention_cases import Batch, Heads, Setup, chain, random_tree
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_medusa import cpu_attention_backend as backend_module
from vllm_medusa import cpu_tree_plan
from vllm_medusa.cpu_attention_backend import TreeCPUAttentionBackend

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="vLLM's CPU operations are part of its CPU build only"
)

# Largest difference to float64 over outputs of order 1: float32 sums over <= 700 keys
# leave 2e-6 at most; bfloat16 and float16 results are off by their own rounding
# (2^-9 and 2^-12 of values below 4).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

STAR = (-1, *[0] * 8)
EDGES = {
    "root only": ([5], [(-1,)]),
    "no context": ([0], [STAR]),
    "no context, one of two": ([0, 40], [STAR, STAR]),
    "fills a block": ([23], [STAR]),
    "starts a block": ([32], [chain(4)]),
    "straddles blocks": ([30, 61], [STAR, STAR]),
    "63 nodes over three blocks": ([90], [random_tree(np.random.default_rng(3), 64)]),
    "127 nodes beside fewer": ([70, 30, 0], [random_tree(np.random.default_rng(4), 128), STAR,
                                             random_tree(np.random.default_rng(5), 65)]),
    "same rows and blocks, other lengths": ([33, 40, 47], [STAR, STAR, STAR]),
    "rows differ": ([70, 3, 150], [chain(3), STAR, (-1, 0, 0, 1)]),
    "blocks out of order": ([200, 5, 90], [STAR, STAR, STAR]),
    "long": ([690], [STAR]),
}  # fmt: skip


@pytest.fixture(params=["compiled", "PyTorch"], autouse=True)
def way(request, monkeypatch) -> str:
    """Float32 trees go to the compiled kernel where it is at hand, all others to PyTorch."""
    if request.param == "compiled" and backend_module.kernels() is None:
        pytest.skip("no C++ compiler, so nothing compiled to test")
    if request.param == "PyTorch":
        monkeypatch.setattr(backend_module, "kernels", lambda: None)
    return request.param


def tree_batch(heads: Heads, block_size: int, contexts, trees, tail=(), **options) -> Batch:
    rows = [len(tree) for tree in trees] + [rows for _, rows in tail]
    return Batch(heads, block_size, [*contexts, *(context for context, _ in tail)], rows, **options)


def check(output: torch.Tensor, batch: Batch, trees, **options) -> None:
    start = 0
    for request, tree in enumerate(trees):
        rows = output[start : start + len(tree)].double()
        error = (rows - batch.expected(request, tree, **options)).abs().max().item()
        assert error <= TOLERANCE[batch.heads.dtype], (request, error)
        start += len(tree)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_tree_rows_match_a_float64_loop(edge, dtype, monkeypatch):
    contexts, trees = EDGES[edge]
    heads = Heads(dtype=dtype)
    batch = tree_batch(heads, 32, contexts, trees)
    setup = Setup(TreeCPUAttentionBackend, heads, 32, monkeypatch)
    setup.builder.tree_batch = batch.trees(trees)
    check(setup.attend(batch), batch, trees)


@pytest.mark.parametrize(
    ("heads", "block_size"),
    [
        (Heads(9, 3, 64, torch.bfloat16), 128),
        (Heads(4, 4, 32), 64),
        (Heads(8, 1, 128), 32),
        (Heads(4, 2, 80), 48),
    ],
    ids=["SmolLM2", "no groups", "one KV head", "vec16"],
)
def test_other_shapes_and_layouts(heads, block_size, monkeypatch):
    rng = np.random.default_rng(1)
    contexts = [150, 0, 127, 260]
    trees = [random_tree(rng, rows) for rows in (17, 9, 33, 9)]
    batch = tree_batch(heads, block_size, contexts, trees)
    setup = Setup(TreeCPUAttentionBackend, heads, block_size, monkeypatch)
    setup.builder.tree_batch = batch.trees(trees)
    check(setup.attend(batch), batch, trees)


@pytest.mark.parametrize(
    ("heads", "block_size", "options", "served"),
    [
        (Heads(), 32, {}, True),
        (Heads(4, 2, 80), 48, {}, True),
        (Heads(dtype=torch.bfloat16), 32, {}, False),
        (Heads(), 32, {"sliding_window": 20}, False),
        (Heads(), 32, {"logits_soft_cap": 2.0}, False),
        (Heads(), 32, {"sinks": torch.zeros(6)}, False),
        (Heads(), 32, {"quantization": "compressed-tensors"}, False),
    ],
    ids=["float32", "blocks of 48", "bfloat16", "window", "soft cap", "sinks", "quantised"],
)
def test_what_the_compiled_kernel_serves(heads, block_size, options, served, way, monkeypatch):
    batch = tree_batch(heads, block_size, [40], [STAR])
    setup = Setup(TreeCPUAttentionBackend, heads, block_size, monkeypatch, **options)
    setup.builder.tree_batch = batch.trees([STAR])
    compiled = served and way == "compiled"
    metadata = setup.builder.build(0, batch.common())
    assert (metadata.step is not None, len(metadata.trees)) == (compiled, 1 - compiled)
    assert setup.impl.one_call == compiled


@pytest.mark.parametrize("context", [0, 95, 700])
def test_a_compiled_row_does_not_depend_on_its_neighbours(context, way, monkeypatch):
    """Row j of a chain is the last row of the chain that ends there, bit by bit."""
    if way == "PyTorch":
        pytest.skip("PyTorch's products depend on the number of rows")
    whole = tree_batch(Heads(), 32, [context], [chain(17)])
    setup = Setup(TreeCPUAttentionBackend, Heads(), 32, monkeypatch)
    setup.builder.tree_batch = whole.trees([chain(17)])
    expected = setup.attend(whole)
    for rows in (1, 2, 5, 16):
        part = tree_batch(Heads(), 32, [context], [chain(rows)])
        part.query, part.key, part.value = (
            x[:rows] for x in (whole.query, whole.key, whole.value)
        )
        part.cache, part.slots, part.table = whole.cache, whole.slots[:rows], whole.table
        setup.builder.tree_batch = part.trees([chain(rows)])
        assert torch.equal(setup.attend(part), expected[:rows])


@pytest.mark.parametrize("limit", [1, 1 << 13, 1 << 30], ids=["one", "some", "all"])
def test_tile_size_changes_nothing(limit, monkeypatch):
    monkeypatch.setattr(cpu_tree_plan, "MAX_TILE_SCORES", limit)
    rng = np.random.default_rng(2)
    contexts = [int(c) for c in rng.integers(0, 120, 12)]
    trees = [random_tree(rng, int(rows)) for rows in rng.choice([1, 5, 9], 12)]
    batch = tree_batch(Heads(), 32, contexts, trees)
    setup = Setup(TreeCPUAttentionBackend, Heads(), 32, monkeypatch)
    setup.builder.tree_batch = batch.trees(trees)
    check(setup.attend(batch), batch, trees)


@pytest.mark.parametrize("window", [1, 3, 33, 64, 500])
def test_sliding_window_counts_tree_positions(window, monkeypatch):
    contexts, trees = [0, 31, 100, 101], [STAR, chain(6), STAR, (-1, 0, 1, 1, 3)]
    batch = tree_batch(Heads(), 32, contexts, trees)
    setup = Setup(TreeCPUAttentionBackend, Heads(), 32, monkeypatch, sliding_window=window)
    setup.builder.tree_batch = batch.trees(trees)
    check(setup.attend(batch), batch, trees, window=window)


def test_soft_cap_and_sinks(monkeypatch):
    sinks = torch.linspace(-1, 3, 6)
    contexts, trees = [40, 41, 7], [STAR, STAR, chain(3)]
    batch = tree_batch(Heads(), 32, contexts, trees)
    options = {"logits_soft_cap": 2.0, "sinks": sinks}
    setup = Setup(TreeCPUAttentionBackend, Heads(), 32, monkeypatch, **options)
    setup.builder.tree_batch = batch.trees(trees)
    check(setup.attend(batch), batch, trees, soft_cap=2.0, sinks=sinks)


@pytest.mark.parametrize("window", [None, 20])
def test_chains_agree_with_vllm(window, monkeypatch):
    """A tree without branches is what vLLM's own kernel computes."""
    heads, options = Heads(), {"sliding_window": window, "logits_soft_cap": 4.0}
    trees = [chain(9), chain(5)]
    batch = tree_batch(heads, 32, [100, 20], trees, garbage=3.0)
    ours = Setup(TreeCPUAttentionBackend, heads, 32, monkeypatch, **options)
    ours.builder.tree_batch = batch.trees(trees)
    stock = Setup(CPUAttentionBackend, heads, 32, monkeypatch, **options)
    difference = ours.attend(batch) - stock.attend(batch)
    # Both sum in float32, in another order.
    assert difference.abs().max().item() <= 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_behind_the_trees_are_vllms_own(dtype, monkeypatch):
    heads = Heads(dtype=dtype)
    tail = [(70, 1), (0, 40), (33, 17), (9, 1)]
    trees = [STAR, chain(3)]
    batch = tree_batch(heads, 32, [50, 31], trees, tail, garbage=3.0)
    ours = Setup(TreeCPUAttentionBackend, heads, 32, monkeypatch)
    ours.builder.tree_batch = batch.trees(trees)
    output = ours.attend(batch)
    check(output, batch, trees)
    alone = tree_batch(heads, 32, [], [], tail, garbage=3.0)
    first = sum(len(tree) for tree in trees)
    alone.query, alone.key, alone.value = (x[first:] for x in (batch.query, batch.key, batch.value))
    alone.cache, alone.slots, alone.table = batch.cache, batch.slots[first:], batch.table[2:]
    expected = Setup(CPUAttentionBackend, heads, 32, monkeypatch).attend(alone)
    assert torch.equal(output[first:], expected)


@pytest.mark.parametrize("bound", [False, True], ids=["no trees bound", "no request has drafts"])
def test_without_trees_everything_is_vllms_own(bound, monkeypatch):
    batch = Batch(Heads(), 32, [70, 0, 33], [1, 40, 17], garbage=3.0)
    ours = Setup(TreeCPUAttentionBackend, Heads(), 32, monkeypatch)
    if bound:
        ours.builder.tree_batch = batch.trees([])
    stock = Setup(CPUAttentionBackend, Heads(), 32, monkeypatch)
    assert type(ours.builder.build(0, batch.common())) is type(
        stock.builder.build(0, batch.common())
    )
    assert torch.equal(ours.attend(batch), stock.attend(batch))


def test_a_layout_it_cannot_read_gives_way_to_the_generic_one(monkeypatch):
    known = backend_module._layout_is_known
    monkeypatch.setattr(
        backend_module, "_layout_is_known", lambda isa, *rest: isa != "amx" and known("vec", *rest)
    )
    assert backend_module.readable_isa("amx", torch.bfloat16, 128, 64) == "vec"
    monkeypatch.setattr(backend_module, "_layout_is_known", lambda *args: False)
    with pytest.raises(ValueError, match=r"isa='amx' with dtype=torch\.bfloat16, block_size=128"):
        backend_module.readable_isa("amx", torch.bfloat16, 128, 64)


def test_layout_probe_tells_layouts_apart(monkeypatch):
    assert backend_module._layout_is_known("vec", torch.float32, 64, 64)
    real = backend_module.cache_halves

    def row_major_keys(cache):
        keys, values = real(cache)
        return keys.reshape(keys.shape[0], keys.shape[1], keys.shape[3], keys.shape[2]).mT, values

    monkeypatch.setattr(backend_module, "cache_halves", row_major_keys)
    assert not backend_module._layout_is_known("vec", torch.float32, 64, 32)


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"alibi_slopes": [0.5] * 6}, "ALiBi"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"attn_type": "encoder_only"}, "attention type 'encoder_only'"),
    ],
)
def test_what_cannot_be_verified_is_refused(options, feature, monkeypatch):
    with pytest.raises(ValueError, match=feature):
        Setup(TreeCPUAttentionBackend, Heads(), 32, monkeypatch, **options)


def test_a_query_that_is_not_its_tree_is_refused(monkeypatch):
    batch = Batch(Heads(), 32, [10], [9])
    setup = Setup(TreeCPUAttentionBackend, Heads(), 32, monkeypatch)
    setup.builder.tree_batch = batch.trees([chain(5)])
    with pytest.raises(ValueError, match=r"have \[9\] rows, their trees \[5\]"):
        setup.builder.build(0, batch.common())


def test_name_is_the_one_vllm_selects():
    assert TreeCPUAttentionBackend.get_name() == "CPU_ATTN"
