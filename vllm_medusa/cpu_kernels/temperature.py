"""Fall-back of the temperature kernel (``v1/worker/gpu/sample/gumbel.py``)."""

import torch


def temperature_kernel(
    # [num_tokens, vocab_size], in place
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_tokens], row -> request index
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] float32
    temperature_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Divide each row by its request's temperature; 0 (greedy) leaves the row as it is.

    Examples
    --------
    Temperature 0.5 turns logits ``[1, 2]`` into ``[2, 4]``.
    """
    temperatures = temperature_ptr[expanded_idx_mapping_ptr]
    temperatures[temperatures == 0.0] = 1.0
    logits_ptr[:, :vocab_size].div_(temperatures[:, None])
