"""After acceptance: the KV rows of the accepted path move behind their root."""

from __future__ import annotations

from typing import Any

import torch

from vllm_medusa.triton_kernels.checks import WORD_BITS


class PathCompactor:
    """Moves accepted rows of every layer of every KV cache group.

    Parameters
    ----------
    groups : list of (block_table, compact)
        ``block_table`` [max_num_reqs, max_blocks] int32 indexed by request slot;
        ``compact(block_table, idx_mapping, root_positions, path_masks)`` moves one
        group's layers in one launch.
    num_columns : int
        Width of ``sampled_token_ids``: rows of the largest tree.
    """

    def __init__(self, groups: list[tuple[torch.Tensor, Any]], num_columns: int):
        self.groups = groups
        self.num_columns = num_columns

    @classmethod
    def for_runner(cls, runner: Any) -> PathCompactor:
        """Collect the layers of a V2 model runner whose KV cache is allocated.

        Raises
        ------
        ValueError
            When kernels see smaller blocks than the cache manager.
        """
        layers = runner.compilation_config.static_forward_context
        groups = []
        for index, group in enumerate(runner.kv_cache_config.kv_cache_groups):
            block_size = runner.block_tables.block_sizes[index]
            kernel_size = runner.kernel_block_sizes[index]
            if block_size != kernel_size:
                raise ValueError(
                    f"Medusa needs KV blocks that attention reads whole: block_size={block_size} "
                    f"but the attention kernel takes {kernel_size}; set --block-size {kernel_size}"
                )
            # Layers that share a cache (cross-layer sharing) hold the same tensor.
            caches = {}
            for name in group.layer_names:
                cache = layers[name].kv_cache
                caches.setdefault(cache.data_ptr(), cache)
            table = runner.block_tables.block_tables[index].gpu
            groups.append((table, _group_compactor(list(caches.values()), runner.device)))
        return cls(groups, runner.decode_query_len)

    def compact(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs] int64, -1: skip
        sampled_tokens: torch.Tensor,  # [num_reqs, num_columns] int64, path mask in the last ones
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_computed_tokens: torch.Tensor,  # [max_num_reqs] int32, already advanced
    ) -> None:
        """Move row ``root + path[j]`` to ``root + j`` for every request and layer.

        A path that fills all columns is a fully accepted chain: nothing moves, and
        its last column is a token, not a mask. Trees of two mask words, in the last two
        columns, are too shallow for such a path.
        """
        slots = idx_mapping.clamp(min=0)
        roots = num_computed_tokens[slots] - num_sampled
        if self.num_columns > WORD_BITS:
            path_masks = sampled_tokens[:, -2:].contiguous()
        else:
            path_masks = torch.where(num_sampled < self.num_columns, sampled_tokens[:, -1], 1)
        self.move(idx_mapping, roots, path_masks)

    def move(
        self,
        idx_mapping: torch.Tensor,  # [num_reqs] int64, -1: skip
        root_positions: torch.Tensor,  # [num_reqs] int64 or int32
        path_masks: torch.Tensor,  # [num_reqs] or [num_reqs, 2] int64
    ) -> None:
        """The same where the walk's own outputs are at hand."""
        for block_table, move in self.groups:
            move(block_table, idx_mapping, root_positions, path_masks)


def _group_compactor(caches: list[torch.Tensor], device: torch.device) -> Any:
    if device.type == "cpu":
        from vllm_medusa.cpu_attention_backend import CPUKVCompactor

        return CPUKVCompactor(caches)
    from vllm_medusa.triton_kernels import KVCompactor

    compactor = KVCompactor(caches)

    def move(block_table, idx_mapping, root_positions, path_masks) -> None:
        num_reqs = idx_mapping.shape[0]
        compactor(block_table, idx_mapping, root_positions, path_masks, num_reqs=num_reqs)

    return move
