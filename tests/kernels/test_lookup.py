"""lookup_chain: the longest, latest earlier match, exact against twin and plain search."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_medusa.triton_kernels import lookup_chain, reference
from vllm_medusa.triton_kernels.lookup_types import MAX_MATCH, LookupWorkspace

POISON = -77


def searched(tokens, length):
    """The definition: (match, continuation) of one request by comparing every place."""
    best = (0, -1)
    for end in range(len(tokens) - 1):
        match = 0
        while match < MAX_MATCH and match <= end and tokens[end - match] == tokens[-1 - match]:
            match += 1
        if match:
            best = max(best, (match, end))
    match, end = best
    chain = [-1] * length
    for step in range(length if match else 0):
        source = end + 1 + step
        chain[step] = tokens[source] if source < len(tokens) else chain[source - len(tokens)]
    return match, chain


def arguments(histories, length, device, *, max_len=None, slots=None, vocab_size=10**6):
    """By default request r lives in slot 2 r + 1 of a table full of a token that all hold."""
    num_slots = 2 * len(histories) + 2
    slots = [2 * r + 1 for r in range(len(histories))] if slots is None else slots
    max_len = max_len or max(map(len, histories), default=1) + 3
    table = torch.full((num_slots, max_len), 5, dtype=torch.int32)
    lengths = torch.full((num_slots,), POISON, dtype=torch.int32)
    for slot, tokens in zip(slots, histories, strict=True):
        if slot >= 0:
            table[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
            lengths[slot] = len(tokens)
    shape = (len(histories) + 1, length)
    return {
        "chain": torch.full(shape, POISON, dtype=torch.int64, device=device),
        "matches": torch.full(shape[:1], POISON, dtype=torch.int32, device=device),
        "history": table.to(device),
        "lengths": lengths.to(device),
        "slots": torch.tensor(slots, dtype=torch.int64, device=device),
        "vocab_size": vocab_size,
    }


def check(histories, length, device, **options):
    """Kernel and twin against the definition; rows behind the batch stay as they were."""
    slots = options.get("slots") or [0] * len(histories)
    for look, where in ((lookup_chain, device), (reference.lookup_chain, "cpu")):
        own = arguments(histories, length, where, **options)
        look(**own)
        for r, tokens in enumerate(histories):
            match, chain = searched(tokens if slots[r] >= 0 else [], length)
            assert (int(own["matches"][r]), own["chain"][r].tolist()) == (match, chain), (look, r)
        assert int(own["matches"][-1]) == POISON and (own["chain"][-1] == POISON).all()


@pytest.mark.parametrize(
    ("tokens", "match", "chain"),
    [
        ([5, 6, 7, 8, 5, 6], 2, [7, 8, 5]),
        ([5], 0, [-1, -1, -1]),
        ([], 0, [-1, -1, -1]),
        ([1, 2, 3], 0, [-1, -1, -1]),
        ([4, 4], 1, [4, 4, 4]),
        # The latest of two places, then the longer match before the later one.
        ([1, 9, 1, 8, 1], 1, [8, 1, 8]),
        ([3, 1, 9, 7, 1, 8, 3, 1], 2, [9, 7, 1]),
        # The period goes on where the history ends.
        ([7, 1, 2, 1, 2], 2, [1, 2, 1]),
    ],
    ids=["worked example", "one token", "nothing", "new", "twice", "latest", "longest", "period"],
)
def test_small_histories(device, tokens, match, chain):
    own = arguments([tokens], 3, device)
    lookup_chain(**own)
    assert int(own["matches"][0]) == match
    assert own["chain"][0].tolist() == chain
    check([tokens], 3, device)


def test_matches_longer_than_counted_are_as_good(device):
    """Of two places that match MAX_MATCH tokens or more the latest counts, not the longest."""
    line = list(range(100, 120))
    check([[*line, 1, *line[-MAX_MATCH:], 2, *line], [*line[-MAX_MATCH:], 2, *line]], 4, device)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63])
def test_lengths_around_powers_of_two(device, length):
    rng = random.Random(length)
    check([[rng.randrange(4) for _ in range(40)] for _ in range(3)], length, device)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 1026, 2049, 4097])
def test_matches_at_the_edges_of_blocks(device, size):
    """The newest two tokens came once before: at the start, the end or across two blocks."""
    histories = []
    for place in {0, 1, 1021, 1022, 1023, 1024, size // 2, size - 5}:
        tokens = list(range(10, 10 + size))
        if place + 1 < size - 2:
            tokens[place : place + 2] = tokens[-2:] = [1, 2]
            histories.append(tokens)
    check(histories, 4, device)


def test_tables_longer_than_all_programs_read_at_once(device):
    """Eight programs of 1,024 tokens take a second round."""
    tokens = list(range(10, 9010))
    tokens[8500:8503] = tokens[300:303] = tokens[-3:] = [1, 2, 3]
    check([tokens, tokens[:300], [1, 2]], 5, device, max_len=20_000)


def test_one_repeated_token(device):
    check([[3] * 50, [3] * 5], 8, device)


def test_padding_has_no_history(device):
    check([[1, 2, 1], [1, 2, 1], [2, 2]], 3, device, slots=[3, -1, 0])


@pytest.mark.parametrize("bad", [-1, 30, 2**31 - 1])
def test_what_the_target_cannot_embed_is_not_proposed(device, bad):
    """Vocabulary 30: in the continuation it counts as no match, before it not at all."""
    for look, where in ((lookup_chain, device), (reference.lookup_chain, "cpu")):
        texts = [[1, 2, 3, bad, 4, 1, 2], [bad, 9, 2, 3, 4, 5, 1, 2], [1, 2, 29, 0, 1, 2]]
        own = arguments(texts, 3, where, vocab_size=30)
        look(**own)
        assert own["matches"][:3].tolist() == [0, 1, 2]
        assert own["chain"][:3].tolist() == [[-1] * 3, [3, 4, 5], [29, 0, 1]]


def test_no_requests(device):
    check([], 3, device)


def test_a_workspace_serves_many_calls(device):
    rng = random.Random(0)
    workspace = LookupWorkspace.allocate(3, torch.device(device))
    for call in range(4):
        histories = [[rng.randrange(3) for _ in range(10 + 700 * call)] for _ in range(3)]
        own = arguments(histories, 6, device, max_len=4000)
        lookup_chain(**own, workspace=workspace)
        for r, tokens in enumerate(histories):
            assert (int(own["matches"][r]), own["chain"][r].tolist()) == searched(tokens, 6)
        assert not any(tensor.any() for tensor in workspace)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(0, 1200),
    words=st.integers(1, 40),
    length=st.integers(1, 20),
)
def test_any_history(device, seed, size, words, length):
    rng = random.Random(seed)
    check([[rng.randrange(words) for _ in range(size)]], length, device)


@pytest.mark.gpu
def test_graph_replay_over_growing_histories(device):
    """Lengths and tokens are read when the graph runs."""
    rng = random.Random(1)
    texts = [[rng.randrange(6) for _ in range(3000)] for _ in range(64)]
    own = arguments([text[:1] for text in texts], 16, device, max_len=3000)
    workspace = LookupWorkspace.allocate(64, device)
    lookup_chain(**own, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lookup_chain(**own, workspace=workspace)
    for size in (2, 50, 1025, 3000):
        own["history"][1:129:2] = torch.tensor(texts, dtype=torch.int32, device=device)
        own["lengths"][1:129:2] = size
        graph.replay()
        for r, text in enumerate(texts):
            found = int(own["matches"][r]), own["chain"][r].tolist()
            assert found == searched(text[:size], 16)


BAD_ARGUMENTS = [
    ("slots", lambda t: t.float()),
    ("chain", lambda t: t.int()),
    ("chain", lambda t: t[:1]),
    ("chain", lambda t: t.repeat(1, 30)),
    ("chain", lambda t: t[:, :0]),
    ("matches", lambda t: t.long()),
    ("matches", lambda t: t[:1]),
    ("history", lambda t: t.long()),
    ("history", lambda t: t[0]),
    ("lengths", lambda t: t[1:]),
    ("vocab_size", lambda _: 0),
    ("workspace.keys", lambda _: LookupWorkspace.allocate(1, torch.device("cpu"))),
]


@pytest.mark.parametrize(("name", "change"), BAD_ARGUMENTS)
@pytest.mark.parametrize("look", [lookup_chain, reference.lookup_chain], ids=["kernel", "twin"])
def test_bad_arguments_are_named(device, look, name, change):
    good = arguments([[1, 2, 1], [3, 3]], 4, device) | {"workspace": None}
    outer = name.partition(".")[0]
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        look(**good | {outer: change(good[outer])})
