"""Fall-back of the kernel that applies staged writes (``v1/worker/gpu/buffer_utils.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.raw_memory import int32_memory


def apply_write_kernel(
    # [num_rows, row_len] or [num_rows], written; MULTI_GROUP: [num_groups] uint64 addresses
    output_ptr: torch.Tensor,
    # row stride; MULTI_GROUP: [num_groups] int64 row strides
    output_stride: int | torch.Tensor,
    # [>= num_writes] int32
    write_indices_ptr: torch.Tensor,
    # [>= num_writes] int32
    write_starts_ptr: torch.Tensor,
    # [num_values] dtype of the output
    write_contents_ptr: torch.Tensor,
    # [>= num_writes] int32, end of each write in write_contents
    write_cu_lens_ptr: torch.Tensor,
    # [>= num_writes] int32, used only when MULTI_GROUP
    write_group_ids_ptr: torch.Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Copy the content of each staged write to its row, from its start column on.

    Writes are applied in order, so a later one wins where two overlap. Single-value
    writes (one a new request) go in one scatter; longer ones are one copy each.

    Examples
    --------
    Indices ``[2, 0]``, starts ``[1, 0]``, contents ``[7, 8, 9]``, ends ``[2, 3]``:
    row 2 becomes ``[., 7, 8, ...]`` and row 0 becomes ``[9, ...]``.
    """
    starts = write_starts_ptr.numpy().astype(np.int64)
    indices = write_indices_ptr.numpy()
    ends = write_cu_lens_ptr.numpy()
    contents = write_contents_ptr.numpy()
    if MULTI_GROUP:
        groups = write_group_ids_ptr.numpy()
        offsets = indices * output_stride.numpy()[groups] + starts
        outputs = [int32_memory(address) for address in output_ptr.tolist()]
        targets = [outputs[group] for group in groups.tolist()]
    else:
        offsets = indices * np.int64(output_stride) + starts
        # `reshape` of a contiguous table is a view: the writes land in the table.
        flat = output_ptr.numpy().reshape(-1)
        if ends[-1] == len(ends):
            flat[offsets] = contents[: len(ends)]
            return
        targets = [flat] * len(ends)
    begin = 0
    for target, offset, end in zip(targets, offsets.tolist(), ends.tolist(), strict=True):
        target[offset : offset + end - begin] = contents[begin:end]
        begin = end
