"""embed_paths and add_update: what lies between the products of sequential heads."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_medusa.triton_kernels import add_update, embed_paths, reference

POISON = -77.0
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One unit in the last place: results are float32's, rounded to the dtype once, which Triton's
# interpreter does by cutting bfloat16 off. Of float32 some units, for the sums.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}
# name -> parents' paths, labelled by the edge they hit
PATHS = {
    "one parent, the root": [[-1]],
    "one parent": [[-1, 3, 0]],
    "a column twice": [[-1, 0], [-1, 0]],
    "as many parents as a power of two, plus one": [[-1, column] for column in range(5)],
    "five levels": [[-1, 0, 2, 4, 5], [-1, 1, 3, 4, 6], [-1, 6, 5, 4, 3]],
}


def close(got, want):
    rounding = ROUNDING[want.dtype]
    torch.testing.assert_close(got, want, rtol=rounding, atol=1e-6)


def path_inputs(paths, num_reqs, size, dtype, seed=0, vocab=11):
    """Arguments but `out`; the table has a row and a column more than are asked for."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(max, paths)) + 2
    return {
        "hidden": torch.randn(num_reqs, size, generator=generator).to(dtype),
        "tokens": torch.randint(vocab, (num_reqs + 1, width), generator=generator),
        "root_tokens": torch.randint(vocab, (num_reqs,), generator=generator),
        "paths": torch.tensor(paths),
        "embeddings": torch.randn(vocab, size, generator=generator).to(dtype),
    }


def run_paths(launcher, inputs, device):
    (num_reqs, size), (num_parents, depth) = inputs["hidden"].shape, inputs["paths"].shape
    shape = (num_reqs * num_parents, depth + 1, size)
    out = torch.full(shape, POISON, dtype=inputs["hidden"].dtype, device=device)
    launcher(out, **{name: tensor.to(device) for name, tensor in inputs.items()})
    return out.cpu()


def check_paths(inputs, device):
    """Kernel and twin against the definition; hidden states to the bit."""
    hidden, tokens, roots, paths, embeddings = inputs.values()
    got = run_paths(embed_paths, inputs, device)
    twin = run_paths(reference.embed_paths, inputs, "cpu")
    assert torch.equal(got[:, 0], hidden.repeat_interleave(len(paths), 0))
    assert torch.equal(twin[:, 0], got[:, 0])
    rows = embeddings.to(hidden.dtype).double()
    scaled = rows / (rows.square().mean(-1, keepdim=True) + 1e-20).sqrt()
    seen = [
        [tokens[req, column] if column >= 0 else roots[req] for column in path]
        for req in range(len(hidden)) for path in paths.tolist()
    ]  # fmt: skip
    want = scaled[torch.tensor(seen).clamp(min=0)].to(hidden.dtype)
    close(got[:, 1:], want)
    close(twin[:, 1:], want)


def test_worked_example_of_paths(device):
    inputs = path_inputs([[-1]], 1, 2, torch.float32) | {
        "hidden": torch.tensor([[5.0, 7.0]]), "root_tokens": torch.tensor([2]),
        "embeddings": torch.tensor([[0.0, 1.0], [9.0, 9.0], [3.0, 3.0]]),
    }  # fmt: skip
    for launcher, place in ((embed_paths, device), (reference.embed_paths, "cpu")):
        close(run_paths(launcher, inputs, place), torch.tensor([[[5.0, 7.0], [1.0, 1.0]]]))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("num_reqs", [1, 3])
def test_named_paths(device, name, num_reqs):
    check_paths(path_inputs(PATHS[name], num_reqs, 20, torch.float32), device)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 576])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_around_powers_of_two(device, size, dtype):
    check_paths(path_inputs(PATHS["five levels"], 2, size, dtype), device)


def test_embeddings_of_another_dtype_are_cast_before_they_are_scaled(device):
    inputs = path_inputs([[-1, 0]], 2, 33, torch.float16)
    check_paths(inputs | {"embeddings": torch.randn(11, 33)}, device)


def test_tokens_that_were_not_drafted_count_as_the_first(device):
    inputs = path_inputs([[-1, 0], [-1, 1]], 2, 5, torch.float32)
    inputs["tokens"][:, 1] = -1
    inputs["root_tokens"][1] = -1
    check_paths(inputs, device)


def test_embeddings_of_zeros_stay_zeros(device):
    inputs = path_inputs([[-1]], 1, 5, torch.float32)
    inputs["embeddings"].zero_()
    assert (run_paths(embed_paths, inputs, device)[:, 1] == 0).all()
    check_paths(inputs, device)


def test_padded_rows_of_tables_are_not_read(device):
    """Strided states and embeddings, as slices of wider buffers are."""
    inputs = path_inputs(PATHS["one parent"], 2, 12, torch.float32)
    for name in ("hidden", "embeddings"):
        wide = torch.full((len(inputs[name]), 20), float("nan"))
        wide[:, :12] = inputs[name]
        inputs[name] = wide[:, :12]
    check_paths(inputs, device)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), num_reqs=st.integers(1, 4), num_parents=st.integers(1, 6),
    depth=st.integers(1, 5), size=st.integers(1, 70),
)  # fmt: skip
def test_any_paths(device, seed, num_reqs, num_parents, depth, size):
    rng = random.Random(seed)
    paths = [[-1, *(rng.randrange(9) for _ in range(depth - 1))] for _ in range(num_parents)]
    check_paths(path_inputs(paths, num_reqs, size, torch.float32, seed), device)


def test_no_requests(device):
    assert run_paths(embed_paths, path_inputs([[-1]], 0, 4, torch.float32), device).numel() == 0
    empty = torch.zeros(0, 4, device=device)
    add_update(empty, empty, empty)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("hidden", lambda a: a["hidden"].double()),
        ("hidden", lambda a: a["hidden"].new_zeros(2, 32769)),
        ("tokens", lambda a: a["tokens"].int()),
        ("tokens", lambda a: a["tokens"][:1]),
        ("root_tokens", lambda a: a["root_tokens"][:1]),
        ("paths", lambda a: a["paths"].int()),
        ("paths", lambda a: a["paths"][:, :0]),
        ("paths", lambda a: torch.cat([a["paths"]] * 2, 1)[:, ::2]),
        ("embeddings", lambda a: a["embeddings"][:, 1:]),
        ("out", lambda a: a["out"].new_zeros(2, 2, 4)),
        ("out", lambda a: a["out"].new_zeros(2, 3, 8)[..., :4]),
    ],
)
@pytest.mark.parametrize("launcher", [embed_paths, reference.embed_paths], ids=["kernel", "twin"])
def test_bad_arguments_of_paths_are_named(device, launcher, name, damage):
    good = path_inputs([[-1, 0]], 2, 4, torch.float32) | {"out": torch.zeros(2, 3, 4)}
    # Damaged there: a move to the device would make strides dense.
    good = {key: tensor.to(device) for key, tensor in good.items()}
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        launcher(**good | {name: damage(good)})


def update_inputs(num_rows, size, dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states, update = (
        (3 * torch.randn(num_rows, size, generator=generator)).to(dtype) for _ in range(2)
    )
    return states, update, torch.randn(size, generator=generator).to(dtype) if bias else None


def check_update(states, update, bias, device):
    """Kernel and twin against float64; no row behind the batch is written."""
    whole = update.double() if bias is None else update.double() + bias.double()
    want = (states.double() + whole * whole.sigmoid()).to(states.dtype)
    for launcher, place in ((add_update, device), (reference.add_update, "cpu")):
        out = torch.full((len(states) + 1, states.shape[1]), POISON, dtype=states.dtype)
        out, *inputs = (None if t is None else t.to(place) for t in (out, states, update, bias))
        launcher(out[:-1], *inputs)
        close(out[:-1].cpu(), want)
        assert (out[-1] == POISON).all()


@pytest.mark.parametrize("size", [1, 576, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_updates_around_blocks(device, size, bias):
    check_update(*update_inputs(3, size, torch.float32, bias), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_are_rounded_once(device, dtype):
    check_update(*update_inputs(5, 40, dtype), device)


def test_large_updates_of_either_sign(device):
    """SiLU is 0 far below zero, where e^-x overflows float32, and x far above."""
    update = torch.tensor([[-1000.0, 1000.0, -88.0, 0.0]])
    check_update(torch.ones_like(update), update, None, device)


def test_states_inside_of_inputs_and_in_place(device):
    inputs, update, bias = update_inputs(4, 36, torch.float32)
    states = inputs.view(4, 3, 12)[:, 0]
    check_update(states, update[:, :12], bias[:12], device)
    want = states + torch.nn.functional.silu(update[:, :12])
    own = states.to(device, copy=True)
    add_update(own, own, update[:, :12].to(device))
    close(own.cpu(), want)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("states", lambda a: a["states"].double()),
        ("out", lambda a: a["out"][:1]),
        ("out", lambda a: a["out"].bfloat16()),
        ("update", lambda a: a["update"][:, :3]),
        ("update", lambda a: a["update"].repeat(1, 2)[:, ::2]),
        ("bias", lambda a: a["bias"][:3]),
    ],
)
@pytest.mark.parametrize("launcher", [add_update, reference.add_update], ids=["kernel", "twin"])
def test_bad_arguments_of_updates_are_named(device, launcher, name, damage):
    states, update, bias = update_inputs(2, 4, torch.float32)
    good = {"out": torch.zeros(2, 4), "states": states, "update": update, "bias": bias}
    good = {key: tensor.to(device) for key, tensor in good.items()}
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        launcher(**good | {name: damage(good)})


@pytest.mark.gpu
def test_graph_replay_at_a_served_shape(device):
    """Ten parents of 8 requests, 4096 columns, four tokens each, replayed with other tokens."""
    paths = [[-1, *(random.Random(p).sample(range(20), 3))] for p in range(10)]
    inputs = {
        name: tensor.to(device)
        for name, tensor in path_inputs(paths, 8, 4096, torch.bfloat16, vocab=1000).items()
    }
    out = torch.empty(80, 5, 4096, dtype=torch.bfloat16, device=device)
    states = torch.empty(80, 4096, dtype=torch.bfloat16, device=device)
    update = torch.randn_like(states)

    def level():
        embed_paths(out, **inputs)
        add_update(states, out[:, 0], update)

    level()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        level()
    for _ in range(10):
        inputs["tokens"].random_(1000)
        inputs["hidden"].normal_()
        graph.replay()
        want = torch.empty_like(out)
        reference.embed_paths(want, **inputs)
        close(out, want)
        want_states = torch.empty_like(states)
        reference.add_update(want_states, want[:, 0], update)
        close(states, want_states)
