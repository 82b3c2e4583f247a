"""Attention under trees on NVIDIA GPUs.

Requests with drafts lead vLLM's batch; their rows go to the tree kernel, the rest
(prefill, plain decode) to FlashAttention exactly as without this plugin.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_medusa.float8_cache import cache_arguments
from vllm_medusa.triton_kernels import tree_attention
from vllm_medusa.triton_kernels.attention_plan import AttentionPlan
from vllm_medusa.triton_kernels.repeated_launch import RepeatedLaunch

if TYPE_CHECKING:
    from vllm_medusa.tree_batch import TreeBatch


@dataclass
class TreeAttentionMetadata:
    """Metadata of one attention group for one step.

    Attributes
    ----------
    num_tree_reqs, num_tree_tokens : int
        Leading requests (and their query rows) for the tree kernel.
    query_start_loc : torch.Tensor, [num_reqs + 1] int32
    seq_lens : torch.Tensor, [num_reqs] int32
        Keys of each request, this step's rows included.
    block_table : torch.Tensor, [num_reqs, max_blocks] int32
    masks : torch.Tensor, [max_num_reqs, W] int64
    max_query_len, max_seq_len : int
        Bounds over the tree requests.
    rest : FlashAttentionMetadata or None
        The remaining requests.
    counters : torch.Tensor or None, [MOST_COUNTERS] int32
    plan : AttentionPlan or None
        Of the first layer that has run; the others take it as it is.
    launches : dict
        That layer's, which the others repeat with their own tensors.
    """

    num_tree_reqs: int
    num_tree_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    masks: torch.Tensor
    max_query_len: int
    max_seq_len: int
    num_actual_tokens: int
    rest: FlashAttentionMetadata | None
    counters: torch.Tensor | None = None
    plan: AttentionPlan | None = None
    launches: dict[Hashable, list[RepeatedLaunch]] = field(default_factory=dict)


class TreeAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Splits a batch into its tree requests and the rest."""

    # FULL graphs for pure verification batches of one query length, PIECEWISE for mixed ones.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    # Bound by the runner once the KV cache exists.
    tree_batch: TreeBatch | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata | TreeAttentionMetadata:
        """FlashAttention's own metadata when no request has drafts, else the split."""
        num_tree_reqs = 0 if self.tree_batch is None else self.tree_batch.num_tree_reqs
        if num_tree_reqs == 0:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return self._build_split(common_attn_metadata, num_tree_reqs)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata | TreeAttentionMetadata:
        """A uniform batch of whole or cut trees is captured on the tree kernel, any other on FA."""
        common = common_attn_metadata
        if (
            self.tree_batch is not None
            and self.tree_batch.is_tree(common.max_query_len)
            and common.num_actual_tokens == common.num_reqs * common.max_query_len
        ):
            return self._build_split(common, common.num_reqs)
        return super().build(0, common)

    def _build_split(
        self, common: CommonAttentionMetadata, num_tree_reqs: int
    ) -> TreeAttentionMetadata:
        starts, num_trees = common.query_start_loc_cpu, num_tree_reqs
        # In a FULL graph the padded requests are part of the launch, with no rows.
        whole_batch = num_tree_reqs >= common.num_reqs or int(starts[num_tree_reqs]) >= int(
            starts[common.num_reqs]
        )
        if whole_batch:
            num_tree_reqs = common.num_reqs
            num_tree_tokens = common.num_actual_tokens
            rest = None
        else:
            num_tree_tokens = int(starts[num_tree_reqs])
            rest = super().build(0, _tail(common, num_tree_reqs, num_tree_tokens))
        return TreeAttentionMetadata(
            num_tree_reqs=num_tree_reqs,
            num_tree_tokens=num_tree_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            masks=self.tree_batch.step_masks,
            max_query_len=int((starts[1 : num_trees + 1] - starts[:num_trees]).max()),
            max_seq_len=common.max_seq_len,
            num_actual_tokens=common.num_actual_tokens,
            rest=rest,
            counters=self.tree_batch.attention_counters,
        )


def _tail(
    common: CommonAttentionMetadata, first_req: int, first_token: int
) -> CommonAttentionMetadata:
    """The batch without its leading requests, as a batch of its own."""

    def cut(rows):
        return None if rows is None else rows[first_req:]

    starts_cpu = common.query_start_loc_cpu[first_req:] - first_token
    return common.replace(
        query_start_loc=common.query_start_loc[first_req:] - first_token,
        query_start_loc_cpu=starts_cpu,
        seq_lens=common.seq_lens[first_req:],
        num_reqs=common.num_reqs - first_req,
        num_actual_tokens=common.num_actual_tokens - first_token,
        max_query_len=int((starts_cpu[1:] - starts_cpu[:-1]).max()),
        block_table_tensor=common.block_table_tensor[first_req:],
        slot_mapping=common.slot_mapping[first_token:],
        positions=None if common.positions is None else common.positions[first_token:],
        is_prefilling=cut(common.is_prefilling),
        seq_lens_cpu_upper_bound=cut(common.seq_lens_cpu_upper_bound),
        req_idx=cut(common.req_idx),
        rswa_prefix_lens=cut(common.rswa_prefix_lens),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class TreeAttentionImpl(FlashAttentionImpl):
    """FlashAttention with the tree kernel in front for verification rows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.alibi_slopes is not None:
            raise ValueError(
                "Medusa does not run with ALiBi: its bias follows key slots, not tree positions"
            )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: FlashAttentionMetadata | TreeAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all rows of the batch, written to ``output``."""
        if not isinstance(attn_metadata, TreeAttentionMetadata):
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        meta = attn_metadata
        if meta.rest is not None:
            tail = slice(meta.num_tree_tokens, meta.num_actual_tokens)
            super().forward(
                layer, query[tail], key[tail], value[tail], kv_cache, meta.rest, output[tail]
            )
        # Layers of a step have tensors of equal shapes: the first one's check serves all.
        meta.plan = tree_attention(
            output[: meta.num_tree_tokens].view(-1, self.num_heads, self.head_size),
            query[: meta.num_tree_tokens],
            block_table=meta.block_table,
            query_start_loc=meta.query_start_loc,
            seq_lens=meta.seq_lens,
            tree_masks=meta.masks,
            **cache_arguments(self, layer, query, kv_cache),
            scale=self.scale,
            num_reqs=meta.num_tree_reqs,
            max_query_len=meta.max_query_len,
            max_seq_len=meta.max_seq_len,
            sliding_window=self.sliding_window[0] + 1,
            logit_soft_cap=float(self.logits_soft_cap),
            sinks=self.sinks,
            counters=meta.counters,
            plan=meta.plan,
            launches=meta.launches,
        )
        return output


class TreeAttentionBackend(FlashAttentionBackend):
    """``attention_backend="CUSTOM"`` while Medusa is on."""

    @staticmethod
    def get_name() -> str:
        """Shown in vLLM's log."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        """Implementation class."""
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeAttentionMetadataBuilder]:
        """Metadata builder class."""
        return TreeAttentionMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Head sizes of both FlashAttention and the tree kernel."""
        return head_size in (64, 80, 96, 128, 256)

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Prefix-LM masks are refused."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Reference sliding windows are refused."""
        return False
