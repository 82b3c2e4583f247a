"""Fall-backs of the resampling half of vLLM's rejection sampler."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.gumbel import gumbel_argmax
from vllm_medusa.cpu_kernels.rejection import require_plain_drafts


def resample_kernel(
    # [num_reqs, num_blocks] int64, block 0 written
    resampled_local_argmax_ptr: torch.Tensor,
    resampled_local_argmax_stride: int,
    # [num_reqs, num_blocks] float32 or float64, block 0 written
    resampled_local_max_ptr: torch.Tensor,
    resampled_local_max_stride: int,
    # [num_logits, >= vocab_size]
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    target_rejected_logsumexp_ptr: torch.Tensor,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_rejected_logsumexp_ptr: torch.Tensor,
    # [num_reqs] int32, number of accepted drafts
    rejected_step_ptr: torch.Tensor,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    # [num_logits], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [num_logits] int32
    draft_sampled_ptr: torch.Tensor,
    # [max_num_reqs] float32
    temp_ptr: torch.Tensor,
    # [max_num_reqs] int64
    seed_ptr: torch.Tensor,
    # [num_logits] int64
    pos_ptr: torch.Tensor,
    cumulative_log_p_ptr: torch.Tensor | None,
    contexts_ptr: torch.Tensor | None,
    contexts_stride: int,
    watermarking_ptr: torch.Tensor | None,
    watermarking_skip_mask_ptr: torch.Tensor | None,
    watermark_key_0: int,
    watermark_key_1: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
    USE_FP64: bool,
    USE_BLOCK_VERIFICATION: bool,
    CONTEXT_WIDTH: int,
    WATERMARK: bool,
    DEDUPLICATE_CONTEXTS: bool,
) -> None:
    """Sample the token after the accepted drafts, never the draft just rejected.

    Examples
    --------
    Draft 4 rejected: token 4 is masked and the rest of the row sampled as usual.
    """
    require_plain_drafts(
        draft_logits=HAS_DRAFT_LOGITS,
        block_verification=USE_BLOCK_VERIFICATION,
        watermarking=WATERMARK,
    )
    bounds = cu_num_logits_ptr.numpy()
    rows = (bounds[:-1] + rejected_step_ptr.numpy()).astype(np.int64)
    reqs = expanded_idx_mapping_ptr.numpy()[rows]
    logits = target_logits_ptr[torch.from_numpy(rows), :vocab_size].float().numpy()
    after_draft = np.flatnonzero(rows < bounds[1:] - 1)
    rejected = draft_sampled_ptr.numpy()[rows[after_draft] + 1]
    known = rejected >= 0
    logits[after_draft[known], rejected[known]] = -np.inf
    values, tokens = gumbel_argmax(
        logits,
        temp_ptr.numpy()[reqs],
        seed_ptr.numpy()[reqs],
        pos_ptr.numpy()[rows],
        apply_temperature=False,
        use_fp64=USE_FP64,
    )
    resampled_local_max_ptr.numpy()[:, 0] = values
    resampled_local_argmax_ptr.numpy()[:, 0] = tokens


def insert_resampled_kernel(
    # [num_reqs, num_speculative_steps + 1] int64, written
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    # [num_reqs] int32, in: accepted drafts, out: sampled tokens
    num_sampled_ptr: torch.Tensor,
    # [num_reqs, num_blocks], winner in block 0
    resampled_local_argmax_ptr: torch.Tensor,
    resampled_local_argmax_stride: int,
    resampled_local_max_ptr: torch.Tensor,
    resampled_local_max_stride: int,
    resample_num_blocks: int,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    # [num_logits], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] float32
    temp_ptr: torch.Tensor,
    PADDED_RESAMPLE_NUM_BLOCKS: int,
) -> None:
    """Append the resampled token; a greedy rejection has its token already.

    Examples
    --------
    Two drafts accepted and token 9 resampled: column 2 is 9 and the count 3.
    """
    bounds = cu_num_logits_ptr.numpy()
    num_sampled = num_sampled_ptr.numpy()
    rows = bounds[:-1] + num_sampled
    temperatures = temp_ptr.numpy()[expanded_idx_mapping_ptr.numpy()[rows]]
    inserted = np.flatnonzero((temperatures != 0.0) | (rows == bounds[1:] - 1))
    resampled = resampled_local_argmax_ptr.numpy()[inserted, 0]
    sampled_ptr.numpy()[inserted, num_sampled[inserted]] = resampled
    num_sampled += 1
