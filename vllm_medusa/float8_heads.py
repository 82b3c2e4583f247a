"""Independent heads as they draft with weights in float8: one launch for each layer of all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vllm_medusa.draft_weights import Float8Weight, frozen
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.heads import shared_logits


class Float8Heads(nn.Module):
    """What :class:`vllm_medusa.heads.MedusaHeads` computes, with rounded matrices.

    Layers and lm_heads are rounded; biases and the narrow matrices of low-rank lm_heads are not.

    Parameters
    ----------
    weights : HeadWeights
        Of independent heads.
    device
        Where these weights live.

    Raises
    ------
    ValueError
        The heads are sequential.
    """

    def __init__(self, weights: HeadWeights, device: torch.device | str | None = None) -> None:
        super().__init__()
        spec = self.spec = weights.spec
        if spec.sequential:
            raise ValueError("heads: found sequential heads; draft them with SequentialHeads")

        def copy(tensor: torch.Tensor | None) -> nn.Parameter | None:
            return None if tensor is None else frozen(tensor.detach().to(device, copy=True))

        # Of each layer [num_heads, hidden_size, hidden_size]
        self.layers = nn.ModuleList(Float8Weight(layer, device) for layer in weights.weight)
        # [num_layers, num_heads, hidden_size]
        self.bias = copy(weights.bias)
        # [1 or num_heads, output_size, lm_head_width]
        self.lm_head = None if weights.lm_head is None else Float8Weight(weights.lm_head, device)
        # [num_heads, lm_head_rank, hidden_size]
        self.lm_head_down = copy(weights.lm_head_down)
        # [1 or num_heads, output_size] int64: head's vocabulary id -> base vocabulary id
        self.register_buffer(
            "token_map",
            None if weights.token_map is None else weights.token_map.to(device, copy=True),
        )

    def draft_logits(
        self,
        # [n, hidden_size], spec.dtype
        hidden: torch.Tensor,
        # [m, hidden_size] -> [m, vocab_size]; None for own lm_heads
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return logits [n, num_heads, output_size] in the heads' vocabulary."""
        # [1 or num_heads, n, hidden_size]: the first layer reads the same for all heads.
        states = hidden[None]
        for index, layer in enumerate(self.layers):
            bias = None if self.bias is None else self.bias[index]
            states = layer.all_products(states, states=states, bias=bias)
        states = states.expand(self.spec.num_heads, -1, -1)
        if self.lm_head is not None:
            return self._own_logits(states)
        return shared_logits(states, apply_lm_head, self.token_map)

    def _own_logits(self, states: torch.Tensor) -> torch.Tensor:
        # [num_heads, n, hidden_size] -> [n, num_heads, output_size]
        if self.lm_head_down is not None:
            states = torch.bmm(states, self.lm_head_down.transpose(1, 2))
        if self.spec.num_lm_heads > 1:
            return self.lm_head.all_products(states).transpose(0, 1)
        rows = states.transpose(0, 1)
        return self.lm_head.product(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
