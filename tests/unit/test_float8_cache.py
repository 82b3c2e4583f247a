"""What tree attention is told of a float8 cache: the same bytes, and factors of equal count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_medusa.float8_cache import cache_arguments
from vllm_medusa.triton_kernels import reference

E4M3 = torch.float8_e4m3fn
HEADS, KV_HEADS, SIZE, ROWS = 4, 2, 16, 3


def layer(q_scale, k_scale, v_scale) -> SimpleNamespace:
    """The factors of vLLM's attention layer."""
    scales = (torch.tensor(scale) for scale in (q_scale, k_scale, v_scale))
    return SimpleNamespace(**dict(zip(("_q_scale", "_k_scale", "_v_scale"), scales, strict=True)))


def impl(dtype: str) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_dtype=dtype, head_size=SIZE)


def cache(dtype: torch.dtype) -> torch.Tensor:
    """[num_blocks, KV_HEADS, block_size, 2 * SIZE] in vLLM's order of memory."""
    return torch.randn(4, 16, KV_HEADS, 2 * SIZE).to(dtype).transpose(1, 2)


def attend(query: torch.Tensor, arguments: dict) -> torch.Tensor:
    """The twin on one chain of three rows behind 20 keys, float32."""
    out = torch.full((ROWS, HEADS, SIZE), float("nan"))
    reference.tree_attention(
        out, query, block_table=torch.tensor([[2, 0, 3]], dtype=torch.int32),
        query_start_loc=torch.tensor([0, ROWS], dtype=torch.int32),
        seq_lens=torch.tensor([20 + ROWS], dtype=torch.int32),
        tree_masks=torch.tensor([[0b1, 0b11, 0b111]]), scale=0.25, num_reqs=1,
        max_query_len=ROWS, max_seq_len=32, **arguments,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize(
    "scales", [(2.0, 0.5, 3.0), (2.0, [0.5, 0.25], 3.0)], ids=["per tensor", "keys per head"]
)
def test_bytes_are_read_with_their_factors(dtype, scales):
    query, kv_cache = torch.randn(ROWS, HEADS, SIZE).to(E4M3), cache(E4M3)
    bytes_ = kv_cache.transpose(1, 2).view(torch.uint8).transpose(1, 2)
    arguments = cache_arguments(impl(dtype), layer(*scales), query, bytes_)
    assert arguments["k_cache"].dtype == arguments["v_cache"].dtype == E4M3
    assert arguments["k_cache"].data_ptr() == kv_cache.data_ptr()
    got = attend(query, arguments)

    q_scale, k_scale, v_scale = (torch.tensor(scale) for scale in scales)
    keys, values = kv_cache.float().transpose(1, 2).split(SIZE, -1)
    plain = {
        "k_cache": (keys * k_scale.reshape(-1, 1)).contiguous(),
        "v_cache": (values * v_scale).contiguous(),
    }
    want = attend(query.float() * q_scale, plain)
    # Factors are powers of two but for v_scale, which rounds once.
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_queries_that_were_not_rounded_keep_their_scale():
    query = torch.randn(ROWS, HEADS, SIZE, dtype=torch.bfloat16)
    bytes_ = cache(E4M3).transpose(1, 2).view(torch.uint8).transpose(1, 2)
    arguments = cache_arguments(impl("fp8"), layer(7.0, 0.5, 3.0), query, bytes_)
    assert "q_scale" not in arguments
    assert arguments["k_scale"] == 0.5


def test_other_caches_have_no_factors():
    kv_cache = cache(torch.bfloat16)
    arguments = cache_arguments(impl("auto"), layer(7.0, 7.0, 7.0), kv_cache, kv_cache)
    assert set(arguments) == {"k_cache", "v_cache"}
    assert torch.equal(arguments["v_cache"], kv_cache.transpose(1, 2)[..., SIZE:])
