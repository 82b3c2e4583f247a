"""The few-row product of a CPU: values against float64, rows bit by bit, and no compiler."""

from __future__ import annotations

import logging

import pytest
import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

if not current_platform.is_cpu():
    pytest.skip("vLLM's CPU operations are part of its CPU build only", allow_module_level=True)

current_platform.import_kernels()

from vllm_medusa import cpu_linear, cpu_rows  # noqa: E402 (needs the kernels)

needs_compiler = pytest.mark.skipif(
    cpu_rows.compiler() is None, reason="no C++ compiler, so no product to test"
)

# Rounding errors of n float32 additions are near-independent: off by at most a few times
# sqrt(n) 2^-24 of the sum of absolute products (Higham and Mary, 2019).
FEW_TIMES = 2
# depth, width: one panel, odd depths, more panels than threads, a model's own
SHAPES = {"one panel": (3, 16), "odd": (577, 48), "model": (576, 960), "deep": (1536, 576)}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> cpu_rows.RowKernels:
    return cpu_rows.load(tmp_path_factory.mktemp("kernels"))


def tolerance(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Largest error of every element of ``x @ weight.T``."""
    return FEW_TIMES * x.shape[1] ** 0.5 * 2**-24 * (x.double().abs() @ weight.double().abs().T)


def case(shape: str, rows: int, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, depth] and a weight [width, depth], float32."""
    depth, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(depth + rows)
    x = torch.randn(rows, depth, generator=generator)
    return x, torch.randn(width, depth, generator=generator).to(stored).float()


@needs_compiler
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 12, 13, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_matches_float64(kernels, shape, rows, stored):
    x, weight = case(shape, rows, stored)
    panels = cpu_rows.pack(weight)
    assert panels.dtype == (torch.int32 if stored == torch.bfloat16 else torch.float32)
    result = cpu_rows.product(kernels, x, panels)
    expected = x.double() @ weight.double().T
    assert result.shape == expected.shape
    assert ((result.double() - expected).abs() <= tolerance(x, weight)).all()


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_its_neighbours(kernels, shape):
    x, weight = case(shape, 19, torch.float32)
    panels = cpu_rows.pack(weight)
    alone = torch.cat([cpu_rows.product(kernels, row[None], panels) for row in x])
    for rows in range(1, 20):
        assert torch.equal(cpu_rows.product(kernels, x[:rows], panels), alone[:rows])


@needs_compiler
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_weights_kept_as_bfloat16_change_no_bit(kernels, rows):
    x, weight = case("model", rows, torch.bfloat16)
    # Signs, zeros, the smallest and the largest bfloat16 among the ordinary ones.
    weight[0, :5] = torch.tensor([0.0, -0.0, 9.2e-41, -3.38e38, 3.38e38]).bfloat16().float()
    x[:, 3:5] = 0.0
    halves = cpu_rows.pack(weight)
    whole = weight.view(-1, cpu_rows.PANEL, weight.shape[1]).transpose(1, 2).contiguous()
    assert (halves.dtype, whole.dtype) == (torch.int32, torch.float32)
    assert torch.equal(cpu_rows.product(kernels, x, halves), cpu_rows.product(kernels, x, whole))


@needs_compiler
def test_leading_axes_and_strides_are_kept(kernels):
    x, weight = case("odd", 12, torch.float32)
    panels = cpu_rows.pack(weight)
    expected = cpu_rows.product(kernels, x, panels)
    assert torch.equal(cpu_rows.product(kernels, x.view(3, 4, -1), panels), expected.view(3, 4, -1))
    spread = torch.stack([x, x], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(cpu_rows.product(kernels, spread, panels), expected)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(24, 8), torch.zeros(16, 8).bfloat16(), torch.zeros(2, 16, 8)],
    ids=["24 outputs", "bfloat16", "3 axes"],
)
def test_other_weights_are_not_packed(weight):
    assert not cpu_rows.can_pack(weight)


class Layer(LinearBase):
    """A layer as far as the choice of its product looks at it."""

    def __init__(self, weight: torch.Tensor):
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


class Table(VocabParallelEmbedding):
    """An embedding table, likewise."""

    __init__ = Layer.__init__


def stock_choice(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = "stock"


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 6, cpu_linear.MOST_ROWS, cpu_linear.MOST_ROWS + 1])
def test_layer_of_few_and_many_rows(rows, bias):
    x, weight = case("model", rows, torch.float32)
    offsets = torch.arange(960.0) if bias else None
    layer = Layer(weight)
    cpu_linear.make_dispatch(stock_choice)(layer, remove_weight=True)
    assert layer.weight.numel() == 0
    result = layer.cpu_linear(x, layer.weight, offsets)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), offsets.double() if bias else None
    )
    # Sums near 960 are rounded to 2^-14.
    assert ((result.double() - expected).abs() <= tolerance(x, weight) + 2**-14 * bias).all()
    few = cpu_rows.product(cpu_linear.kernels(), x, cpu_rows.pack(weight))
    if rows <= cpu_linear.MOST_ROWS:
        assert torch.equal(result, few if offsets is None else few + offsets)


@pytest.mark.parametrize(
    "layer",
    [Layer(torch.zeros(24, 8)), Table(torch.zeros(32, 8)), torch.nn.Linear(8, 32)],
    ids=["24 outputs", "embedding table", "not vLLM's"],
)
def test_other_layers_keep_the_stock_choice(layer):
    cpu_linear.make_dispatch(stock_choice)(layer, remove_weight=True)
    assert layer.cpu_linear == "stock"


@needs_compiler
def test_digest_tells_products_apart():
    _, whole = case("model", 1, torch.float32)
    _, halves = case("model", 1, torch.bfloat16)
    digests = set()
    for weights in ((), (whole,), (halves,), (halves, whole), (whole, halves)):
        layers = [Layer(weight.clone()) for weight in weights]
        for layer in layers:
            cpu_linear.make_dispatch(stock_choice)(layer, remove_weight=True)
        digests.add(cpu_linear.packed_layers(torch.nn.ModuleList(layers)))
    assert len(digests) == 5


@needs_compiler
def test_one_operation_that_torch_compile_keeps():
    x, weight = case("model", 6, torch.float32)
    layer = Layer(weight)
    cpu_linear.make_dispatch(stock_choice)(layer, remove_weight=False)
    operation = torch.ops.vllm_medusa.rows_product.default
    arguments = (x, cpu_rows.pack(weight), None, layer.many_rows_product.handler_tensor)
    torch.library.opcheck(operation, arguments)
    assert layer.weight.shape == (960, 576)


@pytest.mark.parametrize(
    ("name", "reason"), [("no-such-compiler", "no C.. compiler"), ("false", "false failed")]
)
def test_without_a_working_compiler(name, reason, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", name)
    with pytest.raises(OSError, match=reason):
        cpu_rows.load(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    cpu_linear.kernels.cache_clear()
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    try:
        assert cpu_linear.kernels() is None
        assert cpu_linear.kernels() is None
    finally:
        cpu_linear.kernels.cache_clear()
    assert [r.getMessage().count("oneDNN multiplies") for r in caplog.records] == [1]
