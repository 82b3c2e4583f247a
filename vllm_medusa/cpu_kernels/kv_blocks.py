"""Fall-back of the kernel that zeroes KV blocks (``v1/worker/utils.py``)."""

import torch

from vllm_medusa.cpu_kernels.raw_memory import int32_memory


def zero_kv_blocks_kernel(
    # [num_segments] int64 addresses
    seg_addrs_ptr: torch.Tensor,
    # [num_segments] int64, in int32 elements
    seg_block_strides_ptr: torch.Tensor,
    # [num_segments] int64, in int32 elements
    seg_page_sizes_ptr: torch.Tensor,
    # [num_blocks] int64
    block_ids_ptr: torch.Tensor,
    BLOCK_SIZE: int,
) -> None:
    """Zero one page of every segment for each block.

    Examples
    --------
    Block 2 of a segment with stride 8 and page size 4: elements 16 to 19.
    """
    block_ids = block_ids_ptr.tolist()
    for address, stride, page_size in zip(
        seg_addrs_ptr.tolist(),
        seg_block_strides_ptr.tolist(),
        seg_page_sizes_ptr.tolist(),
        strict=True,
    ):
        memory = int32_memory(address)
        for block_id in block_ids:
            memory[block_id * stride : block_id * stride + page_size] = 0
