"""TrainableHeads: any kind of heads that MedusaHeads serves, with fp32 master weights."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_medusa.head_weights import TENSORS, HeadSpec, HeadWeights
from vllm_medusa.heads_path import check_path, path_updates
from vllm_medusa.training.loss import IGNORE


class LossInputs(NamedTuple):
    """Arguments of ``medusa_one_loss`` after the heads' variant was applied."""

    # [num_heads, rows, width]
    hidden: Tensor
    # [output_size, hidden] frozen, or [1 or num_heads, output_size, width] trained
    output_weight: Tensor
    # [rows, num_heads] int64 in the heads' vocabulary
    labels: Tensor


class TrainableHeads(nn.Module):
    """K heads of L independent blocks ``x + SiLU(W x + b)`` in front of an output matrix.

    Every head and every layer has parameters of its own, stacked so that all heads are one
    batched product a layer. W and b start at zero: each head starts as the lm_head itself
    (paper 2.1.1).

    Parameters
    ----------
    num_heads, num_layers, hidden_size : int
    device : torch.device or str
    spec : HeadSpec, optional
        For other kinds than heads on the shared lm_head; the three sizes come from it then.
        Its dtype is that of the export, training is in float32.
    """

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        device: torch.device | str = "cpu",
        spec: HeadSpec | None = None,
    ) -> None:
        super().__init__()
        spec = spec or HeadSpec(num_heads, num_layers, hidden_size, bias=True)
        self.spec = spec
        # A checkpoint without biases gets some to train.
        zeros = replace(spec, bias=True).zero_parameters(torch.float32, device)
        # [num_layers, num_heads, hidden out, hidden in] float32
        self.weight = zeros["weight"]
        # [num_layers, num_heads, hidden] float32
        self.bias = zeros["bias"]
        # [1 or num_heads, output_size, lm_head_width] float32
        self.lm_head = zeros["lm_head"]
        # [num_heads, rank, hidden] float32
        self.lm_head_down = zeros["lm_head_down"]
        # [num_path_weights, hidden, hidden] float32
        self.path_weight = zeros["path_weight"]
        # [1, output_size] int64, and its inverse [vocab], IGNORE outside of the subset
        self.register_buffer("token_map", None)
        self.register_buffer("token_places", None, persistent=False)

    @classmethod
    def from_spec(
        cls,
        spec: HeadSpec,
        # [vocab, hidden]
        lm_head_weight: Tensor,
        # [output_size] int64 base ids, for a vocabulary subset
        token_ids: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> "TrainableHeads":
        """New heads of any kind that start as near to the lm_head as their kind allows.

        Own lm_heads are copies of the base's; low-rank ones its best approximation of that
        rank, by a truncated singular value decomposition.
        """
        if not spec.bias or spec.vocab_subset_per_head:
            raise ValueError(
                f"spec is {spec}; expected bias=True and one vocabulary subset for all heads"
            )
        heads = cls(0, 0, 0, device, spec)
        if token_ids is not None:
            heads.set_subset(token_ids, lm_head_weight.shape[0])
        with torch.no_grad():
            start = lm_head_weight.to(device).float()
            if heads.token_map is not None:
                start = start[heads.token_map[0]]
            if heads.lm_head_down is not None:
                up, down = low_rank(start, spec.lm_head_rank)
                heads.lm_head.copy_(up.expand_as(heads.lm_head))
                heads.lm_head_down.copy_(down.expand_as(heads.lm_head_down))
            elif heads.lm_head is not None:
                heads.lm_head.copy_(start.expand_as(heads.lm_head))
        return heads

    @classmethod
    def from_weights(
        cls, weights: HeadWeights, device: torch.device | str = "cpu"
    ) -> "TrainableHeads":
        """Heads that hold a loaded checkpoint, for instance to start Medusa-2 from Medusa-1."""
        spec = weights.spec
        if spec.vocab_subset_per_head:
            raise ValueError(
                f"the checkpoint has format {weights.format} with a vocabulary subset per head; "
                "expected one for all heads"
            )
        heads = cls(0, 0, 0, device, spec)
        if weights.token_map is not None:
            size = spec.vocab_size or int(weights.token_map.max()) + 1
            heads.set_subset(weights.token_map[0], size)
        with torch.no_grad():
            for name in TENSORS:
                source, target = getattr(weights, name), getattr(heads, name)
                if source is not None and target is not None:
                    target.copy_(source)
        return heads

    def set_subset(self, token_ids: Tensor, vocab_size: int) -> None:
        """Score only ``token_ids`` of the base vocabulary."""
        device = self.weight.device
        ids = token_ids.to(device, torch.int64)
        if ids.numel() != self.spec.vocab_subset_size:
            raise ValueError(
                f"token_ids holds {ids.numel()} ids; expected {self.spec.vocab_subset_size}, the "
                "spec's vocab_subset_size"
            )
        self.token_map = ids.unsqueeze(0)
        self.token_places = torch.full((vocab_size,), IGNORE, dtype=torch.int64, device=device)
        self.token_places[ids] = torch.arange(ids.numel(), device=device)

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def num_heads(self) -> int:
        return self.spec.num_heads

    def forward(self, hidden: Tensor, path_embeddings: Tensor | None = None) -> Tensor:
        """Hidden states after each head's blocks, in the dtype of ``hidden``.

        Parameters
        ----------
        hidden : Tensor
            [rows, hidden], fp32, bf16 or float64; the products run in this dtype.
        path_embeddings : Tensor, optional
            [rows, num_heads, hidden] of the tokens t+1 .. t+num_heads, for sequential heads.

        Returns
        -------
        Tensor
            [num_heads, rows, hidden]
        """
        check_path(self.spec, hidden.shape[0], path_embeddings)
        states = hidden.unsqueeze(0).expand(self.num_heads, -1, -1)
        for layer in range(self.num_layers):
            weight = self.weight[layer].to(hidden.dtype)
            bias = self.bias[layer].to(hidden.dtype).unsqueeze(1)
            update = torch.baddbmm(bias, states, weight.mT)
            if layer == 0 and self.path_weight is not None:
                added = path_updates(self.path_weight.to(hidden.dtype), path_embeddings)
                update = update + added.transpose(0, 1)
            states = states + functional.silu(update)
        return states

    def loss_inputs(
        self,
        # [rows, hidden]
        hidden: Tensor,
        # [rows, num_heads] int64 base ids, IGNORE where there is no label
        labels: Tensor,
        # [vocab, hidden], the base's
        lm_head_weight: Tensor,
        # [rows, num_heads, hidden], for sequential heads
        path_embeddings: Tensor | None = None,
    ) -> LossInputs:
        """Apply the heads; what remains is one output product and a cross entropy.

        Labels outside of a vocabulary subset are ignored: no head could be right about them.
        """
        states = self(hidden, path_embeddings)
        if self.token_places is not None:
            inside = self.token_places[labels.clamp(min=0)]
            labels = torch.where(labels == IGNORE, IGNORE, inside)
        if self.lm_head is None:
            if self.token_map is not None:
                lm_head_weight = lm_head_weight[self.token_map[0]]
            return LossInputs(states, lm_head_weight, labels)
        if self.lm_head_down is not None:
            states = torch.bmm(states, self.lm_head_down.to(hidden.dtype).mT)
        return LossInputs(states, self.lm_head.to(hidden.dtype), labels)

    def to_weights(self, vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> HeadWeights:
        """Copies on the CPU, as ``MedusaHeads`` and ``save_heads`` take them."""
        spec = replace(self.spec, vocab_size=vocab_size, bias=True, dtype=dtype)
        tensors = {
            name: tensor.detach().to("cpu", None if name == "token_map" else dtype, copy=True)
            for name in TENSORS
            if (tensor := getattr(self, name)) is not None
        }
        return HeadWeights(spec, **tensors)


def low_rank(
    # [rows, columns] float32
    matrix: Tensor,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Best ``up [rows, rank] @ down [rank, columns]`` in the least squares sense.

    Through the eigenvectors of the small Gram matrix: with 128k rows a full decomposition would
    take minutes and gigabytes.
    """
    gram = matrix.T.double() @ matrix.double()
    # Ascending eigenvalues: the last columns carry most.
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    down = vectors.T.to(matrix.dtype).contiguous()
    return matrix @ down.T, down
