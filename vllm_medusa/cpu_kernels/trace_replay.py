"""Fall-back of the trace-replay kernel (``v1/worker/gpu/sample/trace_replay.py``)."""

import numpy as np
import torch


def trace_replay_kernel(
    # [num_reqs] int64, in place
    sampled_ptr: torch.Tensor,
    # [num_reqs], batch row -> request index; negative: skip the row
    idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs, max_model_len] int32
    trace_token_ids_ptr: torch.Tensor,
    trace_token_ids_stride: int,
    # [max_num_reqs] int32, three times
    trace_len_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
    prompt_len_ptr: torch.Tensor,
) -> None:
    """Overwrite sampled tokens with those of a recorded trace, where it reaches.

    Examples
    --------
    Trace ``[7, 8]`` after one output token: the sampled token becomes 8.
    """
    reqs = idx_mapping_ptr.numpy()
    step = total_len_ptr.numpy()[reqs] - prompt_len_ptr.numpy()[reqs]
    rows = np.flatnonzero((reqs >= 0) & (step >= 0) & (step < trace_len_ptr.numpy()[reqs]))
    sampled_ptr.numpy()[rows] = trace_token_ids_ptr.numpy()[reqs[rows], step[rows]]
