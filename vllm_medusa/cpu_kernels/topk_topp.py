"""Fall-back of the top-k/top-p kernels (``v1/sample/ops/topk_topp_triton.py``)."""

import torch


def apply_top_k_top_p_triton(
    # [batch_size, vocab_size] float32, possibly in place
    logits: torch.Tensor,
    # [batch_size] int32 or None
    k: torch.Tensor | None,
    # [batch_size] float32 or None
    p: torch.Tensor | None,
    mask_value: float = float("-inf"),
) -> torch.Tensor:
    """Mask all but the top-k / top-p tokens, with vLLM's PyTorch implementation.

    Stands in for the launcher and so for all its kernels. Where logits are tied at
    the edge the two may keep different tokens of equal probability.

    Examples
    --------
    ``k`` = 1 and logits ``[[1, 3, 2]]`` give ``[[-inf, 3, -inf]]``.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    if mask_value != float("-inf"):
        raise ValueError(
            f"mask_value is {mask_value}; the PyTorch implementation of top-k/top-p masks with "
            "-inf only. Leave mask_value at its default."
        )
    return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)
