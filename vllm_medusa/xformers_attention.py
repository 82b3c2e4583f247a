"""xformers' tree attention in the place of this project's kernel, where it is asked for by name.

``speculative_config={"attention": "xformers", ...}``.  xformers attends to the context and to
the tree apart and merges both.  It knows one tree for a whole batch and takes the tree's keys
as dense tensors, which the layer has at hand, and the context in pages of whole multiples of
64 keys.  Batches whose requests verify trees of different sizes go to this project's kernel.
Full CUDA graphs are left to the default: the masks are objects made anew on the host each
step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_medusa.attention_backend import (
    TreeAttentionBackend,
    TreeAttentionImpl,
    TreeAttentionMetadata,
    TreeAttentionMetadataBuilder,
)
from vllm_medusa.tree import TokenTree

PAGE_KEYS = 64  # of the Triton kernel that reads the context
HEAD_SIZES = (64, 128, 256)  # of both, powers of two


def tree_bias(
    tree: TokenTree, num_rows: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``[num_rows, num_rows]`` additive mask of a tree's first rows: 0 for ancestors, else -inf."""
    seen = [[mask >> column & 1 for column in range(num_rows)] for mask in tree.ancestor_masks]
    bits = torch.tensor(seen[:num_rows], dtype=torch.bool, device=device)
    return torch.zeros(num_rows, num_rows, dtype=dtype, device=device).masked_fill_(
        ~bits, float("-inf")
    )


def context_mask(
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32, multiples of `rows`
    contexts: torch.Tensor,  # [num_reqs] int32
    block_table: torch.Tensor,  # [num_reqs, >= pages] int32
    *,
    rows: int,
    page_size: int,
    max_context: int,
) -> Any:
    """The mask of the context part, made of tensors on the device alone.

    xformers' own constructor wants the lengths on the host, where a step does not know them.
    """
    from xformers.ops.fmha.attn_bias import (
        PagedBlockDiagonalPaddedKeysMask,
        _PaddedSeqLenInfo,
        _SeqLenInfo,
    )

    num_reqs, pages = contexts.shape[0], -(-max_context // page_size)
    starts = list(range(0, (num_reqs + 1) * rows, rows))
    queries = _SeqLenInfo(
        seqstart=query_start_loc, max_seqlen=rows, min_seqlen=rows, seqstart_py=starts
    )
    keys = _PaddedSeqLenInfo(
        seqstart=query_start_loc,  # of no meaning where the keys are paged
        max_seqlen=max_context,
        min_seqlen=0,
        seqstart_py=starts,
        seqlen=contexts,
        seqlen_py=[max_context] * num_reqs,
        padding=pages * page_size,
    )
    return PagedBlockDiagonalPaddedKeysMask(queries, keys, block_table[:, :pages], page_size)


def attend(
    output: torch.Tensor,  # [>= num_reqs * rows, num_heads, head_size]
    query: torch.Tensor,  # [>= num_reqs * rows, num_heads, head_size]
    key: torch.Tensor,  # [>= num_reqs * rows, num_kv_heads, head_size], the tree's own
    value: torch.Tensor,
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_size]
    value_cache: torch.Tensor,
    mask: Any,
    bias: torch.Tensor,  # [rows, rows]
) -> None:
    """Attention of equal trees over a paged context, written to the leading rows of `output`.

    Parameters
    ----------
    output, query, key, value : torch.Tensor
        float16 or bfloat16, heads dense.
    key_cache, value_cache : torch.Tensor
        Slots of a block one after another, blocks without padding.
    mask : xformers' PagedBlockDiagonalPaddedKeysMask
        Of :func:`context_mask`.
    bias : torch.Tensor
        Of :func:`tree_bias`.

    Raises
    ------
    ValueError
        When the cache is no run of slots.
    """
    from xformers.ops.tree_attention import tree_attention

    num_reqs, rows = mask.block_tables.shape[0], bias.shape[0]
    num_kv_heads, size = key.shape[1:]
    group = query.shape[1] // num_kv_heads
    shape = (num_reqs, rows, num_kv_heads, group, size)
    num_tokens = num_reqs * rows

    def spread(tensor: torch.Tensor, *leading: int) -> torch.Tensor:
        """KV heads repeated for the query heads that share them, without a copy."""
        return tensor.view(*leading, num_kv_heads, 1, size).expand(-1, -1, -1, group, -1)

    result = tree_attention(
        query[:num_tokens].view(shape),
        spread(key[:num_tokens], num_reqs, rows),
        spread(value[:num_tokens], num_reqs, rows),
        spread(one_run(key_cache), 1, -1),
        spread(one_run(value_cache), 1, -1),
        bias,
        mask,
        prefix_op=split_k_op(),
        suffix_op=split_k_op(),
    )
    output[:num_tokens].view(shape).copy_(result)


@lru_cache(maxsize=1)
def split_k_op() -> type:
    """xformers' Triton kernel, wherever Triton runs.

    xformers 0.0.35, its last release, is compiled for PyTorch 2.10 and refuses every operator
    beside the 2.11 that vLLM 0.32 needs, this one too, which calls nothing that is compiled.
    """
    from xformers.ops.fmha import triton_splitk

    class SplitK(triton_splitk.FwOp):
        @classmethod
        def not_supported_reasons(cls, d: Any) -> list[str]:
            reasons = super().not_supported_reasons(d)
            return [reason for reason in reasons if "build with CUDA support" not in reason]

    return SplitK


def one_run(cache: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, block_size, ...]`` -> ``[num_blocks * block_size, ...]``, no copy.

    Raises
    ------
    ValueError
        Where that takes a copy.
    """
    num_blocks, block_size, *rest = cache.shape
    if num_blocks > 1 and cache.stride(0) != block_size * cache.stride(1):
        raise ValueError(
            f'Medusa does not run with attention="xformers" over a KV cache of strides '
            f"{cache.stride()}: it reads blocks without padding, slots before heads; use "
            'attention="triton"'
        )
    return cache.as_strided((num_blocks * block_size, *rest), cache.stride()[1:])


@dataclass
class XformersMetadata(TreeAttentionMetadata):
    """A batch whose tree requests all have the same number of rows.

    Attributes
    ----------
    context : xformers' PagedBlockDiagonalPaddedKeysMask
    bias : torch.Tensor, [rows, rows]
    """

    context: Any = None
    bias: torch.Tensor | None = None


class XformersMetadataBuilder(TreeAttentionMetadataBuilder):
    """Adds xformers' masks to batches of equal trees."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.biases: dict[int, torch.Tensor] = {}

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ):
        """This project's own metadata for batches that xformers cannot serve, else with masks."""
        meta = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not isinstance(meta, TreeAttentionMetadata):
            return meta
        counts = self.tree_batch.num_rows_np
        if len(counts) == 0 or (counts != counts[0]).any():
            return meta
        num_reqs, rows = len(counts), int(counts[0])
        if rows not in self.biases:
            self.biases[rows] = tree_bias(
                self.tree_batch.tree, rows, self.kv_cache_spec.dtype, self.device
            )
        context = context_mask(
            meta.query_start_loc[: num_reqs + 1],
            meta.seq_lens[:num_reqs] - rows,
            meta.block_table[:num_reqs],
            rows=rows,
            page_size=self.kv_cache_spec.block_size,
            max_context=meta.max_seq_len,
        )
        values = {field.name: getattr(meta, field.name) for field in fields(meta)}
        return XformersMetadata(**values, context=context, bias=self.biases[rows])


class XformersImpl(TreeAttentionImpl):
    """FlashAttention with xformers in front for equal trees."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for wrong, feature in (
            (self.sliding_window[0] >= 0, "sliding windows"),
            (bool(self.logits_soft_cap), "logit soft caps"),
            (self.sinks is not None, "attention sinks"),
            (self.scale != self.head_size**-0.5, f"a softmax scale of {self.scale:g}"),
        ):
            if wrong:
                raise ValueError(
                    f'Medusa does not run with attention="xformers" and {feature}: xformers\' '
                    'tree attention has no argument for it; use attention="triton"'
                )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all rows of the batch, written to ``output``."""
        meta = attn_metadata
        if not isinstance(meta, XformersMetadata):
            rest = (output, output_scale, output_block_scale)
            return super().forward(layer, query, key, value, kv_cache, meta, *rest)
        if meta.rest is not None:
            tail = slice(meta.num_tree_tokens, meta.num_actual_tokens)
            FlashAttentionImpl.forward(
                self, layer, query[tail], key[tail], value[tail], kv_cache, meta.rest, output[tail]
            )
        caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        heads = output.view(-1, self.num_heads, self.head_size)
        attend(heads, query, key, value, *caches, meta.context, meta.bias)
        return output


class XformersTreeBackend(TreeAttentionBackend):
    """``attention_backend="CUSTOM"`` where the speculative config says ``attention: xformers``."""

    # float8 keys need factors of their own row in xformers.
    supported_kv_cache_dtypes = ("auto", "float16", "bfloat16")

    @staticmethod
    def get_impl_cls() -> type[XformersImpl]:
        """Implementation class."""
        return XformersImpl

    @staticmethod
    def get_builder_cls() -> type[XformersMetadataBuilder]:
        """Metadata builder class."""
        return XformersMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Head sizes of xformers' Triton kernel and of this project's."""
        return head_size in HEAD_SIZES

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
        """Pages of whole tiles."""
        return [MultipleOf(PAGE_KEYS)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The default where it fits, else one tile."""
        return default_block_size if default_block_size % PAGE_KEYS == 0 else PAGE_KEYS
