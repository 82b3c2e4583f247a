"""Sequential heads as they draft: one product for all that a head's first layer reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from vllm_medusa.draft_weights import Float8Weight, PlainWeight, frozen
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.heads import base_logits
from vllm_medusa.heads_path import head_rows


class SequentialHeads(nn.Module):
    """The weights of a checkpoint, those of each first layer side by side.

    Head k reads ``1 + k`` vectors, the hidden state and k embeddings.  With its block's matrix and
    the path's in one row the layer is a single product, so nothing is added up afterwards.

    Parameters
    ----------
    weights : HeadWeights
        Of sequential heads.
    device
        Where these weights live.
    later_size : int, optional
        Ids that heads behind the first score, the first of those that it scores; all if left out.
    kind : type, optional
        How layers and lm_heads are held: :class:`PlainWeight` or :class:`Float8Weight`.

    Raises
    ------
    ValueError
        The heads are independent.
    """

    def __init__(
        self,
        weights: HeadWeights,
        device: torch.device | str | None = None,
        later_size: int | None = None,
        kind: type[PlainWeight] | type[Float8Weight] = PlainWeight,
    ) -> None:
        super().__init__()
        self.later_size = later_size
        spec = self.spec = weights.spec
        if not spec.sequential:
            raise ValueError("heads: found independent heads; draft them with top_tokens")

        def copy(tensor: torch.Tensor | None) -> nn.Parameter | None:
            return None if tensor is None else frozen(tensor.detach().to(device, copy=True))

        # Head -> [1, hidden_size, (1 + head) * hidden_size]
        self.first_layers = nn.ModuleList()
        for head in range(1, spec.num_heads + 1):
            parts = [weights.weight[0, head - 1], *weights.path_weight[head_rows(head)]]
            self.first_layers.append(kind(torch.cat(parts, dim=1)[None], device))
        # Of each layer behind the first [num_heads, hidden_size, hidden_size]
        self.later_layers = nn.ModuleList(kind(layer, device) for layer in weights.weight[1:])
        # [num_layers, num_heads, hidden_size]
        self.bias = copy(weights.bias)
        # [1 or num_heads, output_size, lm_head_width]
        self.lm_head = None if weights.lm_head is None else kind(weights.lm_head, device)
        # [n, lm_head_width] -> [n, output_size]: a faster product of a common lm_head
        self.lm_head_product: Callable[[torch.Tensor], torch.Tensor] | None = None
        # [num_heads, lm_head_rank, hidden_size]
        self.lm_head_down = copy(weights.lm_head_down)
        # [1 or num_heads, output_size] int64: head's vocabulary id -> base vocabulary id
        self.register_buffer(
            "token_map",
            None if weights.token_map is None else weights.token_map.to(device, copy=True),
        )

    def size_of(self, head: int) -> int:
        """Ids that one head (from 1) scores."""
        size = self.spec.output_size
        return size if head == 1 or self.later_size is None else min(size, self.later_size)

    def map_of(self, head: int) -> torch.Tensor | None:
        """[1, size_of(head)] int64 of one head (from 1); a common map serves all."""
        if self.token_map is None:
            return None
        index = min(head, self.spec.num_token_maps) - 1
        return self.token_map[index : index + 1, : self.size_of(head)]

    def logits(
        self,
        head: int,
        # [n, 1 + head, hidden_size], spec.dtype: what `kernels.embed_paths` makes
        inputs: torch.Tensor,
        # [n, hidden_size] -> [n, vocab_size]; None for own lm_heads
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return logits [n, size_of(head)] of one head (from 1) in the heads' vocabulary."""
        states = self._states(head, inputs)
        if self.lm_head is not None:
            if self.lm_head_down is not None:
                states = functional.linear(states, self.lm_head_down[head - 1])
            if self.lm_head_product is not None:
                return self.lm_head_product(states)[:, : self.size_of(head)]
            group = min(head, self.spec.num_lm_heads) - 1
            return self.lm_head.product(states, group, self.size_of(head))
        logits, token_map = base_logits(states, apply_lm_head), self.map_of(head)
        return logits[:, : self.size_of(head)] if token_map is None else logits[:, token_map[0]]

    def _states(self, head: int, inputs: torch.Tensor) -> torch.Tensor:
        # -> [n, hidden_size]
        hidden, index = inputs[:, 0], head - 1
        states = self.first_layers[index].residual(inputs.flatten(1), hidden, self._bias(0, index))
        for number, layer in enumerate(self.later_layers, start=1):
            states = layer.residual(states, states, self._bias(number, index), group=index)
        return states

    def _bias(self, layer: int, index: int) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[layer, index]
