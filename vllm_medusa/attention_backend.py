"""Attention under trees on NVIDIA GPUs.

Requests with drafts lead vLLM's batch; their rows go to the tree kernel, the rest
(prefill, plain decode) to FlashAttention exactly as without this plugin. Each kernel is given
the whole batch, with no rows for the requests of the other: nothing has to be cut layer by
layer, and a graph of both serves every mix of them.
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

# KV ranges that FlashAttention may split a prompt's context into inside a graph. Each takes
# float32 room for all rows there, 16 MiB for 1024 rows of 32 heads of 128: vLLM's own 32 would
# take half a GiB, for prompts whose rows fill the device by themselves.
REST_SPLITS = 4


@dataclass
class TreeAttentionMetadata:
    """Metadata of one attention group for one step.

    Attributes
    ----------
    num_tree_reqs, num_tree_tokens : int
        Leading requests (and their query rows) for the tree kernel.
    query_start_loc : torch.Tensor, [num_reqs + 1] int32
        Of the tree kernel.
    seq_lens : torch.Tensor, [num_reqs] int32
        Keys of each request, this step's rows included.
    block_table : torch.Tensor, [num_reqs, max_blocks] int32
    masks : torch.Tensor, [max_num_reqs, W] int64
    max_query_len, max_seq_len : int
        Bounds over the tree requests.
    rest : FlashAttentionMetadata or None
        The same batch for FlashAttention, with no rows for the tree requests.
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

    # FULL graphs for pure verification batches of one query length; those of mixed batches are
    # the runner's (see :mod:`vllm_medusa.mixed_graphs`), any other batch is PIECEWISE.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    # Bound by the runner once the KV cache exists.
    tree_batch: TreeBatch | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # FlashAttention's plan of a mixed graph, in a buffer of its own.
        self.rest_builder = FlashAttentionMetadataBuilder(*args, **kwargs)
        self.rest_builder.max_num_splits = REST_SPLITS
        # Graphs of mixed batches are larger than vLLM's; beyond this FlashAttention would choose
        # its splits anew at every step, with room for those of the capture.
        most_rows = self.vllm_config.scheduler_config.max_num_batched_tokens
        self.rest_builder.max_cudagraph_size = most_rows

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata | TreeAttentionMetadata:
        """FlashAttention's own metadata when no request has drafts, else the split."""
        trees, common = self.tree_batch, common_attn_metadata
        if trees is not None and trees.in_mixed_graph:
            return self._build_mixed(common)
        if trees is None or trees.num_tree_reqs == 0:
            return super().build(common_prefix_len, common, fast_build)
        return self._build_split(common, trees.num_tree_reqs)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata | TreeAttentionMetadata:
        """Uniform whole or cut trees take the tree kernel, mixed batches both, others FA.

        Where one of several requests may hold all rows, the batch may be anything.
        """
        common = common_attn_metadata
        if self.tree_batch is not None:
            longest, num_rows = common.max_query_len, common.num_actual_tokens
            if common.num_reqs > 1 and longest == num_rows:
                self.tree_batch.split_rows(common.query_start_loc, 0)
                return self._build_mixed(common)
            if self.tree_batch.is_tree(longest) and num_rows == common.num_reqs * longest:
                return self._build_split(common, common.num_reqs)
        return super().build(0, common)

    def _build_split(
        self, common: CommonAttentionMetadata, num_tree_reqs: int
    ) -> TreeAttentionMetadata:
        """The tree requests alone, whose number the host knows, and what is left."""
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
            rest_starts = starts[num_tree_reqs : common.num_reqs + 1]
            longest = int((rest_starts[1:] - rest_starts[:-1]).max())
            # FlashAttention 2 takes a longest query of 1 for one row in every request.
            rest = super().build(0, self._behind_trees(common, max_query_len=max(2, longest)))
        return self._metadata(
            common,
            rest,
            num_tree_reqs=num_tree_reqs,
            num_tree_tokens=num_tree_tokens,
            query_start_loc=common.query_start_loc,
            max_query_len=int((starts[1 : num_trees + 1] - starts[:num_trees]).max()),
        )

    def _build_mixed(self, common: CommonAttentionMetadata) -> TreeAttentionMetadata:
        """Any batch, for a graph: what the host says of it is the same at capture and replay."""
        num_rows = common.num_actual_tokens
        rest = self._behind_trees(
            common, max_query_len=num_rows, max_seq_len=self.model_config.max_model_len
        )
        return self._metadata(
            common,
            self.rest_builder.build(0, rest),
            num_tree_reqs=common.num_reqs,
            num_tree_tokens=num_rows,
            query_start_loc=self.tree_batch.tree_starts,
            max_query_len=self.tree_batch.num_rows,
        )

    def _behind_trees(
        self, common: CommonAttentionMetadata, **bounds: int
    ) -> CommonAttentionMetadata:
        """The same batch with no rows for its tree requests, and other bounds."""
        num_starts = common.num_reqs + 1
        starts_cpu = common.query_start_loc_cpu[:num_starts].clamp(
            min=self.tree_batch.num_tree_rows
        )
        return common.replace(
            query_start_loc=self.tree_batch.rest_starts[:num_starts],
            query_start_loc_cpu=starts_cpu,
            **bounds,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )

    def _metadata(
        self,
        common: CommonAttentionMetadata,
        rest: FlashAttentionMetadata | None,
        **trees: int | torch.Tensor,
    ) -> TreeAttentionMetadata:
        return TreeAttentionMetadata(
            **trees,
            rest=rest,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            masks=self.tree_batch.step_masks,
            max_seq_len=common.max_seq_len,
            num_actual_tokens=common.num_actual_tokens,
            counters=self.tree_batch.attention_counters,
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
            super().forward(layer, query, key, value, kv_cache, meta.rest, output)
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
