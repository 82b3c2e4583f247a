"""A custom logits processor that reads the drafts before a row, as vLLM documents them."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

# Tokens before a row that it may not repeat.
WINDOW = 3


class NoRepeatProcessor(LogitsProcessor):
    """Forbids the last ``WINDOW`` tokens to requests with ``extra_args={"no_repeat": 1}``."""

    def __init__(self, vllm_config, req_states):
        self.req_states = req_states
        self.active = np.zeros(req_states.max_num_reqs, dtype=bool)

    def add_request(self, req_idx, sampling_params) -> bool:
        self.active[req_idx] = "no_repeat" in (sampling_params.extra_args or {})
        return bool(self.active[req_idx])

    def apply(self, logits: torch.Tensor, ctx) -> torch.Tensor:
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            if not self.active[slot]:
                continue
            place = int(ctx.expanded_local_pos[row])
            committed = int(self.req_states.total_len.gpu[slot])
            tokens = self.req_states.all_token_ids.gpu[slot, :committed].tolist()
            tokens += ctx.input_ids[row - place + 1 : row + 1].tolist()
            logits[row, tokens[-WINDOW:]] = float("-inf")
        return logits
