"""float8_product: weights in float8 with a factor for each row, inputs as they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_medusa.draft_weights import to_float8_rows
from vllm_medusa.triton_kernels import float8_product, reference
from vllm_medusa.triton_kernels.float8 import Plan, plan_for

POISON = -77.0
# Results are float32's, rounded to the dtype once: one unit in the last place. Sums of float32
# come in another order: some units of the largest one.
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 0.0}
SUMS = 1e-5
# Small blocks, so that small products have several of each.
PLAN = Plan(block_outputs=16, block_rows=16, block_size=32, num_warps=1, num_stages=2)


def make(groups, rows, outputs, size, dtype=torch.float32, shared=False, layer=False, seed=0):
    """Arguments but `out`; `shared`: one input for all groups; `layer`: a whole residual layer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    # Rows of very different sizes, as factors are for.
    spread = torch.logspace(-3, 2, groups * outputs).view(groups, outputs, 1)
    weight, scale = to_float8_rows(random(groups, outputs, size) * spread)
    inputs = random(1 if shared else groups, rows, size).to(dtype)
    arguments = {"inputs": inputs, "weight": weight, "scale": scale}
    if layer:
        arguments["states"] = random(1 if shared else groups, rows, outputs).to(dtype)
        arguments["bias"] = random(groups, outputs).to(dtype)
    return arguments


def definition(arguments):
    """In float64."""
    exact = {name: tensor.double() for name, tensor in arguments.items()}
    total = exact["inputs"] @ (exact["weight"] * exact["scale"][..., None]).transpose(1, 2)
    if "bias" in exact:
        total += exact["bias"][:, None]
    return total if "states" not in exact else exact["states"] + total * total.sigmoid()


def check(arguments, device, plan=PLAN):
    """Kernel and twin against the definition; nothing beside the output is written."""
    dtype = arguments["inputs"].dtype
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 as integers")
    want = definition(arguments)
    largest = want.abs().max().item() if want.numel() else 0.0
    groups, rows, outputs = want.shape
    runs = (float8_product, device, {"plan": plan}), (reference.float8_product, "cpu", {})
    for launcher, place, options in runs:
        # A row's groups side by side, with a row and a column that are nobody's.
        whole = torch.full((rows + 1, groups, outputs + 1), POISON, dtype=dtype, device=place)
        out = whole[:rows, :, :outputs].transpose(0, 1)
        launcher(out, **{name: tensor.to(place) for name, tensor in arguments.items()}, **options)
        torch.testing.assert_close(
            out.cpu().double(), want, rtol=ROUNDING[dtype], atol=SUMS * largest
        )
        assert (whole[rows] == POISON).all()
        assert (whole[..., outputs] == POISON).all()


@pytest.mark.parametrize("launcher", [float8_product, reference.float8_product])
def test_worked_example(device, launcher):
    place = device if launcher is float8_product else "cpu"
    tensors = {
        "inputs": torch.tensor([[[1.0, 2.0]]]),
        "weight": torch.tensor([[[3.0, 4.0]]]).to(torch.float8_e4m3fn),
        "scale": torch.tensor([[0.5]]),
    }
    tensors = {name: tensor.to(place) for name, tensor in tensors.items()}
    out = torch.empty(1, 1, 1, device=place)
    launcher(out, **tensors)
    assert out.item() == 5.5
    bias = torch.tensor([[-5.5]], device=place)
    launcher(out, **tensors, states=torch.ones(1, 1, 1, device=place), bias=bias)
    assert out.item() == 1.0


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_rows_around_blocks(device, rows):
    check(make(2, rows, 20, 40), device)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 50])
def test_outputs_around_blocks(device, outputs):
    check(make(2, 3, outputs, 40), device)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 97])
def test_columns_around_blocks(device, size):
    check(make(2, 3, 20, size), device)


@pytest.mark.parametrize("layer", [False, True], ids=["product", "layer"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_results_are_rounded_once(device, dtype, layer):
    check(make(3, 5, 40, 70, dtype, layer=layer), device)


@pytest.mark.parametrize("layer", [False, True], ids=["product", "layer"])
def test_one_input_for_all_groups(device, layer):
    check(make(3, 18, 20, 40, shared=True, layer=layer), device)


def test_layer_without_a_bias_and_product_with_one(device):
    arguments = make(2, 3, 20, 40, layer=True)
    check({name: tensor for name, tensor in arguments.items() if name != "bias"}, device)
    check({name: tensor for name, tensor in arguments.items() if name != "states"}, device)


def test_every_group_of_one_weight_alone(device):
    """A slice of a group, and its first rows, as heads with a common lm_head read it."""
    arguments = make(3, 4, 40, 33)
    for group in range(3):
        part = {name: tensor[group : group + 1] for name, tensor in arguments.items()}
        check(part | {name: part[name][:, :17] for name in ("weight", "scale")}, device)


def test_padded_inputs_are_not_read(device):
    """Strided inputs and states, as hidden states between embeddings are."""
    arguments = make(2, 6, 20, 40, layer=True)
    for name in ("inputs", "states"):
        rows, wide = arguments[name].transpose(0, 1), torch.full((6, 3, 50), float("nan"))
        wide[:, :2, : rows.shape[2]] = rows
        arguments[name] = wide[:, :2, : rows.shape[2]].transpose(0, 1)
    check(arguments, device)


def test_rows_of_zeros_give_zeros(device):
    arguments = make(1, 3, 20, 40)
    arguments["weight"][0, 7], arguments["scale"][0, 7] = 0, 1
    check(arguments, device)
    assert (definition(arguments)[..., 7] == 0).all()


def test_the_largest_and_the_smallest_numbers_of_float8(device):
    arguments = make(1, 2, 16, 32)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = torch.where(numbers.float().isnan(), 0.0, numbers.float())
    arguments["weight"] = numbers.repeat(2).view(1, 16, 32).to(torch.float8_e4m3fn)
    check(arguments, device)


def test_inputs_that_are_not_finite_stay_in_their_row(device):
    arguments = make(1, 3, 20, 40)
    arguments["inputs"][0, 1, 39] = float("inf")
    out = torch.empty(1, 3, 20, device=device)
    float8_product(out, **{name: tensor.to(device) for name, tensor in arguments.items()})
    assert not out[0, 1].isfinite().any()
    assert out[0, ::2].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 0, 20, 40), (2, 3, 0, 40)], ids=["rows", "outputs"])
def test_nothing_to_do(device, shape):
    groups, rows, outputs, size = shape
    weight, scale = to_float8_rows(torch.zeros(groups, outputs, size, device=device))
    out = torch.empty(groups, rows, outputs, device=device)
    float8_product(out, torch.zeros(groups, rows, size, device=device), weight, scale)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 300])
@pytest.mark.parametrize("outputs", [64, 40000])
def test_chosen_plans_are_ones_that_the_kernel_takes(rows, outputs):
    plan = plan_for(outputs, rows)
    for block, least in zip(plan[:3], (16, 16, 32), strict=True):
        assert block >= least
        assert block & (block - 1) == 0
    # Each block of rows reads the whole weight again, from the L2 cache at best.
    assert plan.block_rows >= min(rows, 128)


@pytest.mark.parametrize("rows", [3, 40, 70])
def test_chosen_plans(device, rows):
    check(make(1, rows, 140, 130, torch.float16), device, plan=None)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 3), rows=st.integers(1, 20),
    outputs=st.integers(1, 40), size=st.integers(1, 70), shared=st.booleans(), layer=st.booleans(),
)  # fmt: skip
def test_any_product(device, seed, groups, rows, outputs, size, shared, layer):
    check(make(groups, rows, outputs, size, torch.float32, shared, layer, seed), device)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("inputs", lambda a: a["inputs"].double()),
        ("inputs", lambda a: a["inputs"][0]),
        ("inputs", lambda a: a["inputs"][:2]),
        ("inputs", lambda a: a["inputs"].repeat(1, 1, 2)[..., ::2]),
        ("weight", lambda a: a["weight"].float()),
        ("weight", lambda a: a["weight"].to(torch.float8_e5m2)),
        ("weight", lambda a: a["weight"][..., 1:]),
        ("weight", lambda a: torch.cat([a["weight"]] * 2, 1)[:, ::2]),
        ("scale", lambda a: a["scale"].half()),
        ("scale", lambda a: a["scale"][:, 1:]),
        ("scale", lambda a: torch.cat([a["scale"]] * 2, 1)[:, : a["scale"].shape[1]]),
        ("out", lambda a: a["out"].half()),
        ("out", lambda a: a["out"][:, :1]),
        ("states", lambda a: a["states"][:2]),
        ("states", lambda a: a["states"].half()),
        ("bias", lambda a: a["bias"][:1]),
        ("bias", lambda a: torch.cat([a["bias"]] * 2, 1)[:, : a["bias"].shape[1]]),
    ],
)
@pytest.mark.parametrize("launcher", [float8_product, reference.float8_product])
def test_bad_arguments_are_named(device, launcher, name, damage):
    good = make(3, 2, 4, 8, layer=True) | {"out": torch.zeros(3, 2, 4)}
    good = {key: tensor.to(device) for key, tensor in good.items()}
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected "):
        launcher(**good | {name: damage(good)})


@pytest.mark.gpu
def test_weights_beyond_2_to_the_31(device):
    """Five lm_heads of 128,256 rows: the last group's begin past 2**31 bytes."""
    weight = torch.zeros(5, 128_256, 4096, dtype=torch.float8_e4m3fn, device=device)
    weight[4, -1] = 1.0
    scale = torch.ones(5, 128_256, device=device)
    inputs = torch.ones(5, 3, 4096, dtype=torch.bfloat16, device=device)
    out = torch.empty(5, 3, 128_256, dtype=torch.bfloat16, device=device)
    float8_product(out, inputs, weight, scale)
    assert (out[4, :, -1] == 4096).all()
    assert out.sum(dtype=torch.float64) == 3 * 4096


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 31, 64, 256])
def test_graph_replay_at_served_shapes(device, rows, dtype):
    """A layer of four heads of 4096 columns, its plan chosen, replayed with other inputs."""
    arguments = make(4, rows, 4096, 4096, dtype, shared=True, layer=True)
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    out = torch.empty(rows, 4, 4096, dtype=dtype, device=device).transpose(0, 1)
    float8_product(out, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        float8_product(out, **arguments)
    for _ in range(3):
        arguments["inputs"].normal_()
        graph.replay()
        want = definition(arguments)
        torch.testing.assert_close(
            out.double(), want, rtol=ROUNDING[dtype], atol=SUMS * want.abs().max().item()
        )
