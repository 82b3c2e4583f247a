"""Qwen2 with three RoPE dimensions and a make-believe image in every prompt.

vLLM's own M-RoPE models bring image processors and their libraries; the positions are what
a tree has to follow, and this class has nothing else.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

# Rows and columns of the patches that stand where the prompt's first tokens are.
ROWS, COLUMNS = 2, 3


class MRoPEQwen2ForCausalLM(Qwen2ForCausalLM, SupportsMRoPE):
    """The text model with ``get_mrope_input_positions``."""

    supports_mrope: ClassVar[Literal[True]] = True

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list
    ) -> tuple[torch.Tensor, int]:
        """Six patches at (0, row, column), then text that counts on from 3: delta is -3."""
        length = len(input_tokens)
        patches = min(ROWS * COLUMNS, length)
        index = torch.arange(length)
        positions = (index - ROWS * COLUMNS + COLUMNS).expand(3, -1).clone()
        rows, columns = index[:patches] // COLUMNS, index[:patches] % COLUMNS
        positions[:, :patches] = torch.stack([torch.zeros_like(rows), rows, columns])
        return positions, COLUMNS - ROWS * COLUMNS
