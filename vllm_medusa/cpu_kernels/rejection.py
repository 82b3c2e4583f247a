"""Fall-backs of the acceptance half of vLLM's rejection sampler (``rejection_sampler_utils.py``).

For drafts without logits, as the n-gram speculator makes. The kernels exchange
statistics of each vocabulary block; these keep those of the whole row in block 0.
"""

import numpy as np
import torch

from vllm_medusa.cpu_kernels.philox import positive_uniform32


def require_plain_drafts(**features: bool) -> None:
    """Refuse the variants of rejection sampling that have no fall-back.

    Parameters
    ----------
    **features : bool
        Name of each variant -> whether the launch asks for it. ``draft_logits=True``
        raises a ValueError that names it.
    """
    wanted = [name for name, enabled in features.items() if enabled]
    if wanted:
        raise ValueError(
            f"Rejection sampling with {', '.join(wanted)} has no PyTorch fall-back on a CPU "
            "without a Triton backend; only drafts without logits (ngram_gpu) are verified there. "
            "Turn the feature off, or set TRITON_INTERPRET=1 (an order of magnitude slower)."
        )


def compute_local_logits_stats_kernel(
    # [num_logits, num_blocks] int64, block 0 written
    target_local_argmax_ptr: torch.Tensor,
    target_local_argmax_stride: int,
    # [num_logits, num_blocks] float32, block 0 written, twice
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    # not written without draft logits
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    # [num_logits, >= vocab_size]
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    # [num_logits], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [num_logits] int32
    expanded_local_pos_ptr: torch.Tensor,
    # [max_num_reqs] float32
    temp_ptr: torch.Tensor,
    vocab_size: int,
    num_speculative_steps: int,
    BLOCK_SIZE: int,
    HAS_DRAFT_LOGITS: bool,
) -> None:
    """Argmax, maximum and sum of exponentials of each row that verifies a draft.

    Examples
    --------
    Logits ``[0, 0]``: maximum 0, sum of exponentials 2.
    """
    require_plain_drafts(draft_logits=HAS_DRAFT_LOGITS)
    logits = target_logits_ptr[:, :vocab_size].float()
    # NumPy's argmax is about ten times as fast as PyTorch's on a CPU.
    tokens = torch.from_numpy(logits.numpy().argmax(axis=1))[:, None]
    values = logits.gather(1, tokens)
    target_local_argmax_ptr[:, :1] = tokens
    target_local_max_ptr[:, :1] = values
    if temp_ptr[expanded_idx_mapping_ptr].any():
        target_local_sumexp_ptr[:, 0] = (logits - values).exp_().sum(dim=-1)


def rejection_kernel(
    # [num_reqs, num_speculative_steps + 1] int64, written
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    # [num_reqs] int32, written
    rejected_steps_ptr: torch.Tensor,
    # read only by the resampling of drafts with logits, so not written
    target_rejected_logsumexp_ptr: torch.Tensor,
    draft_rejected_logsumexp_ptr: torch.Tensor,
    # [num_logits, >= vocab_size]
    target_logits_ptr: torch.Tensor,
    target_logits_stride: int,
    # [num_logits, num_blocks], see compute_local_logits_stats_kernel
    target_local_argmax_ptr: torch.Tensor,
    target_local_argmax_stride: int,
    target_local_max_ptr: torch.Tensor,
    target_local_max_stride: int,
    target_local_sumexp_ptr: torch.Tensor,
    target_local_sumexp_stride: int,
    # [num_logits] int32, input token of the row; negative: not a draft
    draft_sampled_ptr: torch.Tensor,
    draft_logits_ptr: torch.Tensor | None,
    draft_logits_stride_0: int,
    draft_logits_stride_1: int,
    draft_local_max_ptr: torch.Tensor,
    draft_local_max_stride: int,
    draft_local_sumexp_ptr: torch.Tensor,
    draft_local_sumexp_stride: int,
    # [num_reqs + 1] int32
    cu_num_logits_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] float32
    temp_ptr: torch.Tensor,
    # [max_num_reqs] int64
    seed_ptr: torch.Tensor,
    # [num_logits] int64
    pos_ptr: torch.Tensor,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    cumulative_log_p_ptr: torch.Tensor | None,
    local_residual_mass_ptr: torch.Tensor | None,
    local_residual_mass_stride: int,
    vocab_num_blocks: int,
    PADDED_VOCAB_NUM_BLOCKS: int,
    HAS_DRAFT_LOGITS: bool,
    SYNTHETIC_MODE: bool,
    USE_BLOCK_VERIFICATION: bool,
    **launch_options: int,
) -> None:
    """Accept each request's drafts up to the first that fails its test.

    At temperature 0 a draft must be the target's argmax; otherwise its target
    probability must exceed a uniform draw (Leviathan et al., 2211.17192, with a draft
    distribution that is certain of its token).

    Examples
    --------
    Drafts ``[4, 6]`` against target argmaxes ``[4, 5, .]``: one accepted, sampled ``[4, 5]``.
    """
    require_plain_drafts(
        draft_logits=HAS_DRAFT_LOGITS,
        synthetic_acceptance=SYNTHETIC_MODE,
        block_verification=USE_BLOCK_VERIFICATION,
    )
    reqs = idx_mapping_ptr.numpy()
    bounds = cu_num_logits_ptr.numpy()[: len(reqs) + 1].astype(np.int64)
    num_drafts = bounds[1:] - bounds[:-1] - 1
    steps = np.arange(num_drafts.max(initial=0))
    is_draft = steps < num_drafts[:, None]
    rows = np.where(is_draft, bounds[:-1, None] + steps, 0)
    drafts = np.where(is_draft, draft_sampled_ptr.numpy()[np.where(is_draft, rows + 1, 0)], -1)
    valid = drafts >= 0
    greedy = (temp_ptr.numpy()[reqs] == 0.0)[:, None]
    argmaxes = target_local_argmax_ptr.numpy()[rows, 0]
    accepted = valid & (drafts == argmaxes)
    if not greedy.all():
        seeds = np.broadcast_to(seed_ptr.numpy()[reqs][:, None], rows.shape)
        uniform = positive_uniform32(seeds.reshape(-1), pos_ptr.numpy()[rows].reshape(-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            # Rows of greedy requests have no sum of exponentials; their test is above.
            log_sum = np.log(target_local_sumexp_ptr.numpy()[rows, 0])
        log_probs = _logits_at(target_logits_ptr, rows, np.maximum(drafts, 0))
        log_probs = log_probs - (target_local_max_ptr.numpy()[rows, 0] + log_sum)
        passes = log_probs > np.log(uniform).reshape(rows.shape)
        accepted = np.where(greedy, accepted, valid & passes)
    num_accepted = np.logical_and.accumulate(accepted, axis=1).sum(axis=1)
    rejected_steps_ptr.numpy()[:] = num_accepted
    tokens = np.where(accepted, drafts, argmaxes)
    reached = is_draft & (steps <= num_accepted[:, None])
    np.copyto(sampled_ptr.numpy()[:, : len(steps)], tokens, where=reached)


def _logits_at(logits: torch.Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Pick single logits as float32, of any logits dtype."""
    picked = logits[torch.from_numpy(rows), torch.from_numpy(tokens.astype(np.int64))]
    return picked.float().numpy()
