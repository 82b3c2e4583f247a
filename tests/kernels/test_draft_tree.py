"""draft_tree and top_tokens: tokens of every rank, ties by id, exact against twin and sort."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_medusa.triton_kernels import draft_tree, draft_workspace, reference, top_tokens
from vllm_medusa.triton_kernels.draft_workspace import GROUP, DraftWorkspace, num_groups

POISON = -77
CHUNK = 32 * GROUP  # tokens of one program
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sorted_tokens(logits, num_top):
    """The definition: whole vocabulary in order, by Python's stable sort."""
    rows = [
        sorted(range(len(row)), key=lambda token, row=row: -row[token])[:num_top]
        for row in logits.flatten(0, 1).float().nan_to_num(
            nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")
        ).tolist()
    ]  # fmt: skip
    return torch.tensor(rows).view(*logits.shape[:2], num_top)


def run(draft, logits, columns, num_top, device, token_map=None, **options):
    out = torch.full((logits.shape[0] + 1, len(columns)), POISON, dtype=torch.int64, device=device)
    draft(
        out, logits.to(device), torch.tensor(columns, device=device), num_top=num_top,
        token_map=None if token_map is None else token_map.to(device), **options,
    )  # fmt: skip
    assert (out[-1] == POISON).all(), "a row behind the batch was written"
    return out[:-1].cpu()


def check(logits, num_top, device, *, columns=None, token_map=None, **options):
    """Kernel and twin against the definition, to the bit."""
    num_heads = logits.shape[1]
    columns = list(range(min(127, num_heads * num_top))) if columns is None else columns
    got = run(draft_tree, logits, columns, num_top, device, token_map, **options)
    twin = run(reference.draft_tree, logits, columns, num_top, "cpu", token_map)
    want = sorted_tokens(logits, num_top)
    if token_map is not None:
        want = token_map.expand(*logits.shape[:2], -1).gather(2, want)
    check_top_tokens(logits, want, device, token_map=token_map, **options)
    want = want.flatten(1)[:, columns]
    assert torch.equal(got, want)
    assert torch.equal(twin, want)


def run_top_tokens(launcher, logits, num_top, device, token_map=None, **options):
    shape = (logits.shape[0] + 1, logits.shape[1], num_top)
    tokens = torch.full(shape, POISON, dtype=torch.int64, device=device)
    log_probs = torch.full(shape, float(POISON), device=device)
    launcher(
        tokens, log_probs, logits.to(device),
        token_map=None if token_map is None else token_map.to(device), **options,
    )  # fmt: skip
    assert (tokens[-1] == POISON).all()
    assert (log_probs[-1] == POISON).all()
    return tokens[:-1].cpu(), log_probs[:-1].cpu()


def check_top_tokens(logits, want, device, **options):
    """Tokens to the bit; log probabilities near float64's, never above 0, never rising."""
    num_top = want.shape[2]
    limits = torch.finfo(torch.float32)
    finite = logits.double().nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    exact = finite.log_softmax(-1).sort(-1, descending=True).values[..., :num_top]
    for launcher, place in ((top_tokens, device), (reference.top_tokens, "cpu")):
        chosen = options if place == device else {"token_map": options["token_map"]}
        tokens, log_probs = run_top_tokens(launcher, logits, num_top, place, **chosen)
        assert torch.equal(tokens, want)
        assert (log_probs <= 0).all()
        assert (log_probs[..., 1:] <= log_probs[..., :-1]).all()
        # float32 ends where a logit of -inf lies below one of +inf.
        torch.testing.assert_close(
            log_probs.double().clamp(min=limits.min), exact.clamp(min=limits.min),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_worked_example(device):
    logits = torch.tensor([[[1.0, 5.0, 3.0], [9.0, 2.0, 9.0]]])
    assert run(draft_tree, logits, [0, 1, 2], 2, device).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "vocab", [1, 7, GROUP - 1, GROUP, GROUP + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 40]
)
def test_vocabularies_around_groups_and_chunks(device, vocab, dtype):
    check(torch.randn(2, 2, vocab).to(dtype), min(vocab, 10), device)


@pytest.mark.parametrize(
    "vocab", [1, 64 * GROUP, 64 * GROUP + 1, 128 * GROUP - 1, 128 * GROUP, 128 * GROUP + 40]
)
def test_vocabularies_around_the_programs_of_large_batches(device, monkeypatch, vocab):
    monkeypatch.setattr(draft_workspace, "MANY_PROGRAMS", 0)
    check(torch.randn(1, 2, vocab).to(torch.bfloat16), min(vocab, 10), device)


@pytest.mark.parametrize("num_top", [1, 2, 10, 16, 17, 64, 128])
def test_ranks_around_powers_of_two(device, num_top):
    check(torch.randn(1, 2, 1500), num_top, device)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("all-equal", [0.0]),
        ("both-zeros", [0.0, -0.0]),
        ("two-values", [1.0, 2.0]),
        ("infinities", [float("inf"), float("-inf"), 1.0]),
        ("mostly-masked", [float("-inf")] * 60 + [1.0]),
        ("nan-is-last", [float("nan"), 3.0, float("-inf")]),
        ("all-nan", [float("nan")]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_take_the_lowest_ids(device, name, values, dtype):
    rng = random.Random(name)
    logits = torch.tensor([rng.choices(values, k=600) for _ in range(3)])
    check(logits[:, None].to(dtype), 9, device)


def test_best_tokens_in_one_group_and_in_one_each(device):
    """Ten in the last, partial group; ten in ten groups, equal, the first of which decides."""
    logits = torch.zeros(1, 2, 20 * GROUP + 12)
    logits[0, 0, -10:] = torch.arange(10.0) + 1
    logits[0, 1, 5::GROUP] = 1.0
    check(logits, 10, device)


def test_nodes_in_any_order_and_heads_of_few_ranks(device):
    """Head 1 lends 3 ranks, head 2 one, and one that is not its best; a node occurs twice."""
    check(torch.randn(3, 3, 700), 5, device, columns=[0, 6, 2, 14, 1, 0])


@pytest.mark.parametrize("nodes", [63, 64, 65, 127])
def test_nodes_around_powers_of_two(device, nodes):
    columns = random.Random(1).sample(range(5 * 26), nodes)
    check(torch.randn(2, 5, 900), 26, device, columns=columns)


@pytest.mark.parametrize("num_maps", [1, 2], ids=["common", "each"])
def test_vocabulary_subsets(device, num_maps):
    token_map = torch.stack([torch.randperm(10_000)[:300] for _ in range(num_maps)])
    check(torch.randn(2, 2, 300), 4, device, token_map=token_map)


def test_strided_logits(device):
    """Head-major products, and rows cut out of a padded vocabulary."""
    logits = torch.randn(2, 3, 520)[:, :, :500].transpose(0, 1)
    check(logits, 6, device)


def test_workspace_serves_calls_of_any_size(device):
    """Its counters are zero again, and what it holds beside them does not matter."""
    work = DraftWorkspace.allocate(6, 900, device)
    work.maxima.fill_(2**31 - 1)
    for requests, vocab in ((3, 900), (1, 140), (3, 513)):
        check(torch.randn(requests, 2, vocab), 7, device, workspace=work)
        assert (work.counters == 0).all()


def test_no_requests(device):
    check(torch.randn(0, 2, 50), 3, device, columns=[0])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    requests=st.integers(1, 3),
    heads=st.integers(1, 3),
    vocab=st.integers(1, 2 * CHUNK),
    num_values=st.sampled_from([2, 50, 10**6]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_logits(device, seed, requests, heads, vocab, num_values, dtype):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (requests, heads, vocab)
    logits = (torch.randint(num_values, shape, generator=generator) - num_values // 2) / 7
    num_top = rng.randint(1, min(vocab, 12))
    columns = [rng.randrange(heads * num_top) for _ in range(rng.randint(1, 127))]
    check(logits.to(dtype), num_top, device, columns=columns)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 49_152, 128_256, 262_144])
def test_large_vocabularies_and_graph_replay(device, vocab):
    """Replayed on new logits: counters, the meeting of programs and ties at full size."""
    logits = torch.randn(64, 5, vocab, device=device, dtype=torch.bfloat16)
    columns = torch.arange(50, device=device)
    out = torch.empty(64, 50, dtype=torch.int64, device=device)
    work = DraftWorkspace.allocate(64 * 5, vocab, device)
    draft_tree(out, logits, columns, num_top=10, workspace=work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draft_tree(out, logits, columns, num_top=10, workspace=work)
    for _ in range(20):
        logits.normal_()
        out.fill_(POISON)
        graph.replay()
        want = logits.float().sort(dim=-1, descending=True, stable=True).indices[..., :10]
        assert torch.equal(out, want.flatten(1))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 128_256])
def test_top_tokens_of_large_vocabularies_under_graph_replay(device, vocab):
    logits = torch.randn(64, 4, vocab, device=device, dtype=torch.bfloat16)
    tokens = torch.empty(64, 4, 32, dtype=torch.int64, device=device)
    log_probs = torch.empty(64, 4, 32, device=device)
    work = DraftWorkspace.allocate(64 * 4, vocab, device)
    top_tokens(tokens, log_probs, logits, workspace=work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        top_tokens(tokens, log_probs, logits, workspace=work)
    for _ in range(20):
        logits.normal_()
        graph.replay()
        order = logits.float().sort(dim=-1, descending=True, stable=True)
        assert torch.equal(tokens, order.indices[..., :32])
        want = order.values.log_softmax(-1)[..., :32]
        torch.testing.assert_close(log_probs, want, rtol=1e-5, atol=1e-5)
        assert (work.counters == 0).all()


def arguments(device):
    return {
        "out": torch.zeros(2, 3, dtype=torch.int64, device=device),
        "logits": torch.zeros(2, 2, 300, device=device),
        "node_columns": torch.tensor([0, 1, 2], device=device),
        "num_top": 2,
        "token_map": torch.zeros(2, 300, dtype=torch.int64, device=device),
        "workspace": DraftWorkspace.allocate(4, 300, device),
    }


BAD_ARGUMENTS = [
    ("out", lambda a: a["out"][:1]),
    ("out", lambda a: a["out"].int()),
    ("logits", lambda a: a["logits"][0]),
    ("logits", lambda a: a["logits"].double()),
    ("logits", lambda a: a["logits"].transpose(1, 2)),
    ("logits", lambda a: a["logits"][:, :0]),
    ("node_columns", lambda a: a["node_columns"].repeat(43)),
    ("node_columns", lambda a: a["node_columns"][:0]),
    ("num_top", lambda _: 0),
    ("num_top", lambda _: 129),
    ("token_map", lambda a: a["token_map"][:, :9]),
    ("token_map", lambda a: a["token_map"].repeat(2, 1)),
]


@pytest.mark.parametrize(("name", "damage"), BAD_ARGUMENTS)
@pytest.mark.parametrize("draft", [draft_tree, reference.draft_tree], ids=["kernel", "twin"])
def test_bad_arguments_are_named(device, draft, name, damage):
    good = arguments(device)
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        draft(**good | {name: damage(good)})


def test_log_probabilities_by_hand(device):
    logits = torch.tensor([[[0.0, 2.0, 0.0]]])
    tokens, log_probs = run_top_tokens(top_tokens, logits, 2, device)
    assert tokens.tolist() == [[[1, 0]]]
    torch.testing.assert_close(log_probs, torch.tensor([[[-0.2395, -2.2395]]]), rtol=0, atol=1e-4)


def test_weights_of_heads(device):
    logits, weights = torch.randn(2, 3, 300), torch.tensor([1.0, 1.5, 0.25])
    tokens, plain = run_top_tokens(top_tokens, logits, 4, device)
    for launcher, place in ((top_tokens, device), (reference.top_tokens, "cpu")):
        found = run_top_tokens(launcher, logits, 4, place, weights=weights.to(place))
        assert torch.equal(found[0], tokens)
        torch.testing.assert_close(found[1], plain * weights[:, None], rtol=1e-5, atol=1e-5)


def test_a_certain_token_costs_nothing(device):
    logits = torch.zeros(1, 1, 700)
    logits[0, 0, 650] = 1000.0
    _, log_probs = run_top_tokens(top_tokens, logits, 2, device)
    assert log_probs.tolist() == [[[0.0, -1000.0]]]


def run_in_columns(launcher, logits, columns, width, device, **options):
    """Tables of a batch whose ranks go to columns; all else must stay as it was."""
    shape = (logits.shape[0] + 1, width)
    tokens = torch.full(shape, POISON, dtype=torch.int64, device=device)
    log_probs = torch.full(shape, float(POISON), device=device)
    placed = torch.tensor(columns, dtype=torch.int32, device=device)
    options = {name: option.to(device) for name, option in options.items()}
    launcher(tokens, log_probs, logits.to(device), columns=placed, **options)
    assert (tokens[-1] == POISON).all()
    assert (log_probs[-1] == POISON).all()
    return tokens[:-1].cpu(), log_probs[:-1].cpu()


# name -> columns of every head's ranks, labelled by the edge they hit
COLUMNS = {
    "one rank of one head": [[0]],
    "in order": [[0, 1, 2], [3, 4, 5]],
    "backwards, with gaps": [[9, -1, 2], [-1, 7, 0], [5, 4, -1]],
    "a head without nodes": [[1, 2], [-1, -1]],
    "nothing": [[-1, -1, -1]],
    "the last column of five heads": [[-1, -1, -1, 9], *([[-1] * 4] * 4)],
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("num_reqs", [1, 3])
@pytest.mark.parametrize("mapped", [False, True], ids=["all ids", "map"])
def test_ranks_in_columns(device, name, num_reqs, mapped):
    columns, width = COLUMNS[name], 10
    generator = torch.Generator().manual_seed(len(name))
    logits = torch.randn(num_reqs, len(columns), 300, generator=generator)
    options = {"token_map": torch.randperm(900, generator=generator)[None, :300]} if mapped else {}
    plain = run_top_tokens(top_tokens, logits, len(columns[0]), device, **options)
    want = [torch.full((num_reqs, width), POISON), torch.full((num_reqs, width), float(POISON))]
    for head, ranks in enumerate(columns):
        for rank, column in enumerate(ranks):
            for table, found in zip(want, plain, strict=True):
                if column >= 0:
                    table[:, column] = found[:, head, rank]
    for launcher, place in ((top_tokens, device), (reference.top_tokens, "cpu")):
        tokens, log_probs = run_in_columns(launcher, logits, columns, width, place, **options)
        assert torch.equal(tokens, want[0])
        torch.testing.assert_close(log_probs, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens", lambda a: a["tokens"][:, :1]),
        ("tokens", lambda a: a["tokens"].int()),
        ("tokens", lambda a: a["tokens"].transpose(0, 1)),
        ("tokens", lambda a: a["tokens"].repeat(1, 1, 43)),
        ("tokens", lambda a: a["tokens"][:, :, :0]),
        ("log_probs", lambda a: a["log_probs"].double()),
        ("log_probs", lambda a: a["log_probs"][:1]),
        ("logits", lambda a: a["logits"].double()),
        ("token_map", lambda a: a["token_map"][:, :9]),
        ("weights", lambda _: torch.ones(3)),
        ("workspace.sums", lambda a: a["workspace"]._replace(sums=torch.zeros(3))),
        ("columns", lambda _: torch.zeros(2, 3, dtype=torch.int64)),
        ("columns", lambda _: torch.zeros(1, 3, dtype=torch.int32)),
        ("columns", lambda _: torch.zeros(2, 129, dtype=torch.int32)),
        ("columns", lambda _: torch.zeros(3, 2, dtype=torch.int32).T),
    ],
)
@pytest.mark.parametrize("launcher", [top_tokens, reference.top_tokens], ids=["kernel", "twin"])
def test_bad_arguments_of_top_tokens_are_named(device, launcher, name, damage):
    good = {name: a for name, a in arguments(device).items() if name in (
        "logits", "token_map", "workspace")}  # fmt: skip
    good["tokens"] = torch.zeros(2, 2, 3, dtype=torch.int64, device=device)
    good["log_probs"] = torch.zeros(2, 2, 3, device=device)
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        launcher(**good | {name.partition(".")[0]: damage(good)})


@pytest.mark.parametrize("launcher", [top_tokens, reference.top_tokens], ids=["kernel", "twin"])
def test_tables_of_ranks_have_one_row_a_request(device, launcher):
    """With columns the heads' own axis is gone."""
    columns = [[0, 1, 2], [3, 4, 5]]
    for shape, name in (((2, 2, 3), "tokens"), ((2, 6), None), ((1, 6), "tokens")):
        tables = [torch.zeros(shape, dtype=dtype, device=device)
                  for dtype in (torch.int64, torch.float32)]  # fmt: skip
        placed = torch.tensor(columns, dtype=torch.int32, device=device)
        arguments = (*tables, torch.zeros(2, 2, 300, device=device))
        if name is None:
            launcher(*arguments, columns=placed)
            continue
        with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
            launcher(*arguments, columns=placed)


@pytest.mark.parametrize("name", ["counters", "maxima"])
def test_small_workspaces_are_named(device, name):
    good = arguments(device)
    work = good["workspace"]
    assert work.maxima.shape[0] == 4 * num_groups(300) == 12
    work = work._replace(**{name: getattr(work, name)[1:]})
    with pytest.raises(ValueError, match=f"^workspace.{name}: found .*, expected "):
        draft_tree(**good | {"workspace": work})
