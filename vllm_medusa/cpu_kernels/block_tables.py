"""Fall-backs of the block-table kernels (``v1/worker/gpu/block_table.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.raw_memory import int32_memory


def gather_block_tables_kernel(
    # [num_reqs], batch row -> request index
    batch_idx_to_req_idx: torch.Tensor,
    # [num_groups] uint64 addresses of int32 tables [max_num_reqs, stride]
    src_block_table_ptrs: torch.Tensor,
    # [num_groups] uint64 addresses, written
    dst_block_table_ptrs: torch.Tensor,
    # [num_groups] int64
    block_table_strides: torch.Tensor,
    # [num_groups, max_num_reqs] int32, blocks in use
    num_blocks_ptr: torch.Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the used part of each scheduled request's block table into batch order.

    The launch grid, which says how many padded rows to zero, is not passed to a
    fall-back. On a CPU no batch is padded, so there are none.

    Examples
    --------
    Requests ``[3, 1]`` with 2 and 1 used blocks: row 0 of the output starts with the
    two blocks of request 3, row 1 with the one block of request 1.
    """
    reqs = batch_idx_to_req_idx.numpy()
    used = num_blocks_ptr.numpy()[:, reqs]
    for group, (src, dst, stride) in enumerate(
        zip(
            src_block_table_ptrs.tolist(),
            dst_block_table_ptrs.tolist(),
            block_table_strides.tolist(),
            strict=True,
        )
    ):
        columns = np.arange(used[group].max(initial=0))
        src_rows = int32_memory(src)[(reqs * stride)[:, None] + columns]
        dst_rows = int32_memory(dst)[: num_reqs * stride].reshape(num_reqs, stride)
        in_use = columns < used[group][:, None]
        np.copyto(dst_rows[:, : len(columns)], src_rows, where=in_use)


def compute_slot_mappings_kernel(
    max_num_tokens: int,
    # [num_reqs], batch row -> request index; negative: a dummy request without blocks
    idx_mapping: torch.Tensor,
    # [>= num_reqs + 1] int32
    query_start_loc: torch.Tensor,
    # [>= num_tokens] int64
    pos: torch.Tensor,
    # [num_groups] uint64 addresses of int32 tables [max_num_reqs, stride]
    block_table_ptrs: torch.Tensor,
    # [num_groups] int64
    block_table_strides: torch.Tensor,
    # [num_groups] int32
    block_sizes: torch.Tensor,
    # [num_groups] bool
    slot_mapping_enabled: torch.Tensor,
    # [num_groups] bool, used only when CP_SIZE > 1
    dcp_sharded: torch.Tensor,
    # [num_groups, max_num_tokens] int64, written
    slot_mappings_ptr: torch.Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Map each token to its KV slot, ``block * block_size + offset``; the rest is PAD_ID.

    Examples
    --------
    Block size 4 and block table ``[9, 5]``: positions 3 and 4 get slots 39 and 20.
    """
    if CP_SIZE != 1:
        raise ValueError(
            f"decode_context_parallel_size is {CP_SIZE}; on a CPU without a Triton backend only 1 "
            "works, because the slot mapping of context parallelism has no PyTorch fall-back."
        )
    reqs = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: len(reqs) + 1]
    begin, end = int(starts[0]), int(starts[-1])
    positions = pos.numpy()[begin:end]
    req_of_token = np.repeat(reqs, starts[1:] - starts[:-1])
    has_blocks = bool((reqs >= 0).all())
    slots = slot_mappings_ptr.numpy()
    slots[:, end:max_num_tokens] = PAD_ID
    for group, (address, stride, block_size, enabled) in enumerate(
        zip(
            block_table_ptrs.tolist(),
            block_table_strides.tolist(),
            block_sizes.tolist(),
            slot_mapping_enabled.tolist(),
            strict=True,
        )
    ):
        if not enabled:
            slots[group, begin:end] = PAD_ID
            continue
        block, offset = np.divmod(positions, block_size)
        entries = req_of_token * stride + block
        if not has_blocks:
            entries = np.where(req_of_token < 0, 0, entries)
        slot_of_token = int32_memory(address)[entries] * np.int64(block_size) + offset
        if not has_blocks:
            slot_of_token[req_of_token < 0] = PAD_ID
        slots[group, begin:end] = slot_of_token
