"""MedusaHeads: hidden states in, draft tokens of every head out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from vllm_medusa.head_weights import TENSORS, HeadSpec, HeadWeights
from vllm_medusa.heads_path import check_path, path_updates


class MedusaHeads(nn.Module):
    """All heads of a model as one batched product (paper section 2.1.1).

    Head k computes ``softmax(W2 · (SiLU(W1 h + b) + h))``; with more layers the
    bracket repeats, each layer with weights of its own. Nothing here copies from
    device to host or depends on data, so every method may sit in a CUDA graph.

    Parameters
    ----------
    spec
        Shape and dtype. New weights are those of the paper: W1 = 0, b = 0, so
        each head starts as the base's lm_head once ``copy_lm_head`` was called
        (or at once, when it shares the base's).
    device
        Where the weights live.

    Examples
    --------
    >>> heads = MedusaHeads(HeadSpec(3, 1, 8, vocab_size=20, dtype=torch.float32))
    >>> heads(torch.ones(2, 8), torch.zeros(20, 8)).shape
    torch.Size([2, 3, 20])
    """

    def __init__(self, spec: HeadSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        zeros = spec.zero_parameters(spec.dtype, device)
        # [num_layers, num_heads, hidden_size (out), hidden_size (in)]
        self.weight = zeros["weight"]
        # [num_layers, num_heads, hidden_size]
        self.bias = zeros["bias"]
        # [1 or num_heads, output_size, lm_head_width]
        self.lm_head = zeros["lm_head"]
        # [num_heads, lm_head_rank, hidden_size]
        self.lm_head_down = zeros["lm_head_down"]
        # [num_path_weights, hidden_size, hidden_size]
        self.path_weight = zeros["path_weight"]
        # [1 or num_heads, output_size] int64: head's vocabulary id -> base vocabulary id
        self.register_buffer("token_map", None)
        if spec.num_token_maps:
            ids = torch.arange(spec.vocab_subset_size, device=device)
            self.token_map = ids.repeat(spec.num_token_maps, 1)
        # [m, hidden_size] -> [m, output_size]: a faster product of a common lm_head
        self.lm_head_product: Callable[[torch.Tensor], torch.Tensor] | None = None
        # [..., columns held] -> [..., hidden_size], where `weight` and `bias` were cut
        self.gather_columns: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def from_weights(
        cls, weights: HeadWeights, device: torch.device | str | None = None
    ) -> MedusaHeads:
        """Build heads that hold a loaded checkpoint."""
        heads = cls(weights.spec, device)
        heads.load_weights(weights)
        return heads

    @torch.no_grad()
    def load_weights(self, weights: HeadWeights) -> None:
        """Copy a checkpoint into these heads; the spec must be equal."""
        if weights.spec != self.spec:
            raise ValueError(
                f"weights: found {weights.spec}, expected {self.spec}; build the heads with "
                "MedusaHeads.from_weights"
            )
        for name in TENSORS:
            source = getattr(weights, name)
            if source is not None:
                getattr(self, name).copy_(source)

    def to_weights(self, **fields) -> HeadWeights:
        """Return copies on the CPU, as ``save_heads`` takes them.

        Parameters
        ----------
        fields
            Further fields of HeadWeights, e.g. ``metadata``.
        """
        tensors = {
            name: tensor.detach().to("cpu", copy=True)
            for name in TENSORS
            if (tensor := getattr(self, name)) is not None
        }
        return HeadWeights(self.spec, **tensors, **fields)

    @torch.no_grad()
    def copy_lm_head(
        self,
        # [vocab_size, hidden_size]
        lm_head_weight: torch.Tensor,
    ) -> None:
        """Initialise own lm_heads from the base's (paper section 2.1.1), subsets applied."""
        if self.lm_head is None:
            raise ValueError(
                "copy_lm_head: these heads share the base's lm_head, there is nothing to fill; "
                "build them with own_lm_head=True"
            )
        if self.lm_head_down is not None:
            raise ValueError("copy_lm_head: a low-rank lm_head cannot hold the base's; train it")
        if self.token_map is not None:
            lm_head_weight = lm_head_weight[self.token_map]
        self.lm_head.copy_(lm_head_weight.expand_as(self.lm_head))

    def forward_hidden(
        self,
        # [num_tokens, hidden_size], spec.dtype
        hidden: torch.Tensor,
        # [num_tokens, num_heads, hidden_size]; only for sequential heads: the embeddings of the
        # root's token and of the path below it, of which head k sees the first k
        path_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the heads' hidden states, [num_heads, num_tokens, hidden_size]."""
        spec = self.spec
        check_path(spec, hidden.shape[0], path_embeddings)
        if hidden.ndim != 2 or hidden.shape[1] != spec.hidden_size or hidden.dtype != spec.dtype:
            raise ValueError(
                f"hidden: found {list(hidden.shape)} {hidden.dtype}, expected [num_tokens, "
                f"{spec.hidden_size}] {spec.dtype}; flatten the batch, cast, or use heads that "
                "were trained for this model"
            )
        num_tokens = hidden.shape[0]
        # Kept as [num_tokens, num_heads, hidden_size] inside: the first layer is then
        # one plain matrix product, and a shared lm_head needs no transposed copy.
        states = hidden[:, None].expand(num_tokens, spec.num_heads, spec.hidden_size)
        for layer in range(spec.num_layers):
            bias = None if self.bias is None else self.bias[layer]
            if layer == 0:
                flat_weight = self.weight[0].flatten(0, 1)
                update = functional.linear(hidden, flat_weight).unflatten(1, (spec.num_heads, -1))
                if self.path_weight is not None:
                    update = update + path_updates(self.path_weight, path_embeddings)
            else:
                update = torch.einsum("nkd,ked->nke", states, self.weight[layer])
            if bias is not None:
                update = update + bias
            update = functional.silu(update)
            if self.gather_columns is not None:
                update = self.gather_columns(update)
            states = states + update
        return states.transpose(0, 1)

    def forward(
        self,
        # [num_tokens, hidden_size], spec.dtype
        hidden: torch.Tensor,
        # [vocab_size, hidden_size]; the base's, only for heads without own lm_heads
        lm_head_weight: torch.Tensor | None = None,
        # as for forward_hidden
        path_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [num_tokens, num_heads, output_size] in the heads' vocabulary."""
        if (lm_head_weight is None) == (self.lm_head is None):
            raise ValueError(
                f"lm_head_weight: found {'None' if lm_head_weight is None else 'a tensor'}, but "
                f"own_lm_head is {self.spec.own_lm_head}; give the base's lm_head exactly to "
                "heads that have none"
            )
        states = self.forward_hidden(hidden, path_embeddings)
        if lm_head_weight is None:
            return self._own_logits(states)
        if self.token_map is not None:
            return _apply_lm_head(states, lm_head_weight[self.token_map])
        return functional.linear(states.transpose(0, 1), lm_head_weight)

    def top_tokens(
        self,
        # [num_tokens, hidden_size], spec.dtype
        hidden: torch.Tensor,
        num_top: int,
        # [m, hidden_size] -> [m, vocab_size]
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        # [num_tokens, num_heads, hidden_size]; only for sequential heads
        path_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return each head's most likely tokens, best first.

        Parameters
        ----------
        hidden
            Base model's last hidden states (the input of its lm_head).
        num_top
            Tokens per head.
        apply_lm_head
            The base's lm_head, [m, hidden_size] -> logits [m, vocab_size] (gathered
            over tensor-parallel ranks); needed without own lm_heads, else unused.
        path_embeddings
            As for ``forward_hidden``, where one path is known (ranking answers); to draft a tree
            with sequential heads use ``sequential_draft.SequentialDrafter``.

        Returns
        -------
        torch.Tensor
            [num_tokens, num_heads, num_top] int64 ids of the base vocabulary.
        """
        logits = self.draft_logits(hidden, apply_lm_head, path_embeddings)
        if not 1 <= num_top <= logits.shape[-1]:
            raise ValueError(
                f"num_top: found {num_top}, expected 1..{logits.shape[-1]} (the heads' "
                "vocabulary); use a tree with smaller ranks"
            )
        ids = logits.topk(num_top, dim=-1).indices
        if self.token_map is None:
            return ids
        # [num_tokens, num_heads, output_size], a view
        maps = self.token_map.expand(ids.shape[0], self.spec.num_heads, -1)
        return maps.gather(2, ids)

    def draft_logits(
        self,
        # [num_tokens, hidden_size], spec.dtype
        hidden: torch.Tensor,
        # as for top_tokens
        apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        path_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [num_tokens, num_heads, output_size] in the heads' vocabulary."""
        if self.lm_head is not None:
            return self._own_logits(self.forward_hidden(hidden, path_embeddings))
        states = self.forward_hidden(hidden, path_embeddings)
        return shared_logits(states, apply_lm_head, self.token_map)

    def _own_logits(self, states: torch.Tensor) -> torch.Tensor:
        if self.lm_head_down is not None:
            # [num_heads, num_tokens, rank]
            states = torch.bmm(states, self.lm_head_down.transpose(1, 2))
        if self.lm_head_product is not None:
            rows = states.transpose(0, 1)
            return self.lm_head_product(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return _apply_lm_head(states, self.lm_head)


def _apply_lm_head(
    # [num_heads, num_tokens, hidden_size]
    states: torch.Tensor,
    # [1 or num_heads, output_size, hidden_size]
    lm_head: torch.Tensor,
) -> torch.Tensor:
    # -> [num_tokens, num_heads, output_size]
    if lm_head.shape[0] == 1:
        return functional.linear(states.transpose(0, 1), lm_head[0])
    return torch.bmm(states, lm_head.transpose(1, 2)).transpose(0, 1)


def base_logits(
    states: torch.Tensor,  # [m, hidden_size]
    apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """The base's logits [m, vocab_size] for heads that have no lm_head; refused without a base."""
    if apply_lm_head is None:
        raise ValueError(
            "apply_lm_head: found None, but these heads have no lm_head of their own; pass a "
            "callable that applies the base's"
        )
    return apply_lm_head(states)


def shared_logits(
    states: torch.Tensor,  # [num_heads, num_tokens, hidden_size]
    apply_lm_head: Callable[[torch.Tensor], torch.Tensor] | None,
    token_map: torch.Tensor | None,  # [1 or num_heads, output_size]
) -> torch.Tensor:
    """Logits [num_tokens, num_heads, output_size] of independent heads on the base's lm_head."""
    rows = states.transpose(0, 1)
    logits = base_logits(rows.flatten(0, 1), apply_lm_head).unflatten(0, rows.shape[:2])
    if token_map is None:
        return logits
    return logits.gather(2, token_map.expand(*logits.shape[:2], -1))
