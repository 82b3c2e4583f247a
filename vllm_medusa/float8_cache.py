"""A float8 KV cache as tree attention reads it.

vLLM keeps such a cache as bytes, with one factor per tensor (or per KV head) for keys,
values and, where it rounds them too, queries; see FlashAttention's implementation there.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache

from vllm_medusa.vllm_seams import cache_scales


def cache_arguments(
    impl: Any,
    layer: torch.nn.Module,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """What tree attention is told of a layer's cache, by the names of its arguments.

    Parameters
    ----------
    impl : vllm.v1.attention.backends.flash_attn.FlashAttentionImpl
        Knows the cache's dtype and the head size.
    layer : torch.nn.Module
        vLLM's attention layer, which holds the factors.
    query : torch.Tensor, [num_tokens, num_heads, head_size]
        float8 where vLLM has rounded it, else the model's dtype.
    kv_cache : torch.Tensor, [num_blocks, num_kv_heads, block_size, 2 * head_size]
        The model's dtype, or bytes.

    Returns
    -------
    dict
        ``k_cache`` and ``v_cache`` [num_blocks, block_size, num_kv_heads, head_size]; with a
        float8 cache also ``k_scale``, ``v_scale`` and, for float8 queries, ``q_scale``.
    """
    keys, values = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    if not is_quantized_kv_cache(impl.kv_cache_dtype):
        return {"k_cache": keys, "v_cache": values}
    dtype = current_platform.fp8_dtype()
    scales = dict(zip(("q_scale", "k_scale", "v_scale"), cache_scales(layer), strict=True))
    if query.dtype != dtype:
        del scales["q_scale"]
    # The kernel has one stride for all of them.
    most = max(scales.values(), key=torch.Tensor.numel)
    for name, factors in scales.items():
        if factors.numel() < most.numel():
            scales[name] = factors.expand_as(most).contiguous()
    return {"k_cache": keys.view(dtype), "v_cache": values.view(dtype), **scales}
