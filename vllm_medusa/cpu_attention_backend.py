"""vLLM's CPU attention with tree rows in front.

Requests with drafts lead vLLM's batch; their rows are computed by
:mod:`vllm_medusa.cpu_attention` from vLLM's own cache, all other rows (prefill, plain
decode) by vLLM's kernels exactly as without this plugin.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_medusa import cpu_tree_rows
from vllm_medusa.cpu_attention import LayerCache, cache_halves, tree_attention
from vllm_medusa.cpu_compaction import CPUKVCompactor
from vllm_medusa.cpu_linear import kernels
from vllm_medusa.cpu_seams import cpu_ops
from vllm_medusa.cpu_tree_plan import TreePlan, plan_trees

if TYPE_CHECKING:
    from vllm_medusa.tree_batch import TreeBatch

__all__ = [
    "CPUKVCompactor",
    "TreeCPUAttentionBackend",
    "TreeCPUAttentionBuilder",
    "TreeCPUAttentionImpl",
    "TreeCPUAttentionMetadata",
]


@dataclass
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    """A batch whose leading requests are trees.

    The inherited fields describe the whole batch (without scheduler metadata).

    Attributes
    ----------
    num_tree_tokens : int
        Query rows of the tree requests.
    step : TreeStep or None
        The tree requests for layers that the compiled kernel serves.
    trees : dict of int to TreePlan
        The tree requests for the other layers, by sliding window (-1: none).
    rest : CPUAttentionMetadata or None
        The remaining requests, as a batch of their own.
    """

    num_tree_tokens: int = 0
    step: cpu_tree_rows.TreeStep | None = None
    trees: dict[int, TreePlan] = field(default_factory=dict)
    rest: CPUAttentionMetadata | None = None


class TreeCPUAttentionBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch into its tree requests and the rest."""

    # Bound by the runner once the KV cache exists.
    tree_batch: TreeBatch | None = None

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        isa = readable_isa(self.isa, self.dtype, self.block_size, self.head_dim)
        if isa != self.isa:
            self.isa = isa
            self._set_isa_to_layers(layer_names)
        # One cache group may hold windowed and global layers.
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [layer.impl for layer in layers.values()]
        for impl in impls:
            impl.one_call = self._serves_in_one_call(impl)
        self.windows = sorted({impl.sliding_window for impl in impls if not impl.one_call})
        self.one_call = any(impl.one_call for impl in impls)

    def _serves_in_one_call(self, impl: TreeCPUAttentionImpl) -> bool:
        if impl.logits_soft_cap or impl.sinks is not None or impl.sliding_window > 0:
            return False
        if self.vllm_config.model_config.quantization is not None:
            # Layers that quantise their input turn a last bit of attention into a step of
            # 1/127; the other route sums in vLLM's order.
            return False
        shape = (self.kv_cache_spec.dtype, self.head_dim, self.block_size)
        return cpu_tree_rows.can_attend(*shape) and kernels() is not None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """vLLM's own metadata when no request has drafts, else the split."""
        common = common_attn_metadata
        num_tree_reqs = 0 if self.tree_batch is None else self.tree_batch.num_tree_reqs
        if num_tree_reqs == 0:
            return super().build(common_prefix_len, common, fast_build)
        if common.causal is not True:
            raise ValueError(
                f"Medusa verifies trees in causal batches only, found causal={common.causal!r}"
            )
        starts = common.query_start_loc_cpu
        num_rows = (starts[1 : num_tree_reqs + 1] - starts[:num_tree_reqs]).numpy()
        _check_rows(num_rows, self.tree_batch)
        trees = {
            window: plan_trees(
                num_rows,
                common.seq_lens[:num_tree_reqs].numpy(),
                common.block_table_tensor,
                self.tree_batch.step_masks,
                block_size=self.block_size,
                num_heads=self.num_heads,
                sliding_window=window,
            )
            for window in self.windows
        }
        step = None
        if self.one_call:
            step = cpu_tree_rows.TreeStep(
                starts[: num_tree_reqs + 1].numpy(),
                common.seq_lens[:num_tree_reqs].numpy(),
                common.block_table_tensor[:num_tree_reqs].numpy(),
                self.tree_batch.step_masks[:num_tree_reqs].numpy(),
                num_kv_heads=self.num_kv_heads,
                group=self.num_heads // self.num_kv_heads,
                head_size=self.head_dim,
                block_size=self.block_size,
            )
        num_tree_tokens = int(starts[num_tree_reqs])
        rest = None
        if num_tree_tokens < common.num_actual_tokens:
            rest = super().build(0, _tail(common, num_tree_reqs, num_tree_tokens))
        return TreeCPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            num_tree_tokens=num_tree_tokens,
            step=step,
            trees=trees,
            rest=rest,
        )


def _check_rows(num_rows, tree_batch: TreeBatch) -> None:
    expected = tree_batch.num_rows_np[: len(num_rows)]
    if (num_rows != expected).any():
        raise ValueError(
            f"the queries of tree requests have {num_rows.tolist()} rows, their trees "
            f"{expected.tolist()}: a tree request's query must be its tree alone"
        )


def _tail(
    common: CommonAttentionMetadata, first_req: int, first_token: int
) -> CommonAttentionMetadata:
    """What vLLM's CPU builder reads of a batch, without the leading requests."""
    starts_cpu = common.query_start_loc_cpu[first_req:] - first_token
    return CommonAttentionMetadata(
        query_start_loc=common.query_start_loc[first_req:] - first_token,
        query_start_loc_cpu=starts_cpu,
        seq_lens=common.seq_lens[first_req:],
        num_reqs=common.num_reqs - first_req,
        num_actual_tokens=common.num_actual_tokens - first_token,
        max_query_len=int((starts_cpu[1:] - starts_cpu[:-1]).max()),
        max_seq_len=common.max_seq_len,
        block_table_tensor=common.block_table_tensor[first_req:],
        slot_mapping=common.slot_mapping[first_token:],
        causal=common.causal,
    )


def readable_isa(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """The kernel variant whose cache layout :func:`cache_halves` reads on this machine.

    Writes known keys and values through vLLM's operation and compares. AMX, for one,
    packs keys differently; there the generic "vec" kernels serve instead.

    Raises
    ------
    ValueError
        When no variant stores the cache in a layout this module knows.
    """
    for candidate in dict.fromkeys((isa, "vec" if block_size % 32 == 0 else "vec16")):
        if _layout_is_known(candidate, dtype, block_size, head_size):
            return candidate
    raise ValueError(
        f"Medusa cannot read the KV cache of vLLM's CPU kernels here: isa={isa!r} with "
        f"dtype={dtype}, block_size={block_size}, head_size={head_size} packs it differently "
        'than "vec" does'
    )


def _layout_is_known(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> bool:
    num_heads, num_slots = 2, 2 * block_size
    cache = torch.zeros(2, num_heads, block_size, 2 * head_size, dtype=dtype)
    # Multiples of 1/8 below 32: exact in every dtype, different in neighbouring places.
    shape = (num_slots, num_heads, head_size)
    key = (torch.arange(num_slots * num_heads * head_size) * 7 % 251 / 8).to(dtype).view(shape)
    value = key.flip(0)
    halves = cache.view(2, num_heads, 2 * block_size, head_size).chunk(2, dim=2)
    try:
        cpu_ops().cpu_attn_reshape_and_cache(key, value, *halves, torch.arange(num_slots), isa)
    except RuntimeError:
        return False  # not compiled for this machine
    keys, values = cache_halves(cache)
    return torch.equal(keys.permute(0, 3, 1, 2).reshape(shape), key) and torch.equal(
        values.transpose(1, 2).reshape(shape), value
    )


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention with the tree rows computed apart."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.alibi_slopes is not None:
            raise ValueError(
                "Medusa does not run with ALiBi: its bias follows key slots, not tree positions"
            )
        if self.is_fp8_kv_cache:
            raise ValueError(
                f"Medusa on a CPU does not read a quantised KV cache, found "
                f"kv_cache_dtype={self.kv_cache_dtype!r}; use 'auto'"
            )
        self.layer_cache: LayerCache | None = None
        # Set by the builder: whether the compiled kernel computes this layer's trees.
        self.one_call = False
        if self.attn_type != AttentionType.DECODER:
            raise ValueError(
                f"Medusa runs decoder-only models on a CPU, found attention type {self.attn_type!r}"
            )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size]
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all rows of the batch, written to ``output``."""
        meta = attn_metadata
        if not isinstance(meta, TreeCPUAttentionMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, meta, output, output_scale, output_block_scale
            )
        if meta.rest is not None:
            rest = slice(meta.num_tree_tokens, meta.num_actual_tokens)
            super().forward(
                layer,
                query[rest],
                key[rest],
                value[rest],
                kv_cache,
                meta.rest,
                output[rest],
                output_scale,
                output_block_scale,
            )
        if self.one_call:
            cpu_tree_rows.tree_attention(kernels(), output, query, kv_cache, meta.step, self.scale)
            return output
        if self.layer_cache is None or self.layer_cache.source is not kv_cache:
            self.layer_cache = LayerCache(kv_cache)
        tree_attention(
            output.view(-1, self.num_heads, self.head_size),
            query,
            self.layer_cache,
            meta.trees[self.sliding_window],
            scale=self.scale,
            soft_cap=float(self.logits_soft_cap),
            sinks=self.sinks,
        )
        return output


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """Registered over ``CPU_ATTN`` while Medusa is on."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        """Implementation class."""
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUAttentionBuilder]:
        """Metadata builder class."""
        return TreeCPUAttentionBuilder
