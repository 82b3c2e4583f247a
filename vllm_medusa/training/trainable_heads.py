"""TrainableHeads: residual blocks of all heads with fp32 master weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_medusa.head_weights import HeadSpec, HeadWeights


class TrainableHeads(nn.Module):
    """K heads of L independent blocks ``x + SiLU(W x + b)`` in front of a shared lm_head.

    Every head and every layer has parameters of its own, stacked so that all heads are one
    batched product a layer. W and b start at zero: each head starts as the lm_head itself
    (paper 2.1.1).

    Parameters
    ----------
    num_heads, num_layers, hidden_size : int
    device : torch.device or str
    """

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        # [num_layers, num_heads, hidden out, hidden in] float32
        self.weight = nn.Parameter(
            torch.zeros(num_layers, num_heads, hidden_size, hidden_size, device=device)
        )
        # [num_layers, num_heads, hidden] float32
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size, device=device))

    @classmethod
    def from_weights(
        cls, weights: HeadWeights, device: torch.device | str = "cpu"
    ) -> "TrainableHeads":
        """Heads that hold a loaded checkpoint without output matrices of its own."""
        spec = weights.spec
        if spec.own_lm_head or spec.vocab_subset_size is not None:
            raise ValueError(
                f"the checkpoint has format {weights.format} with output matrices or a vocabulary "
                "subset of its own; expected heads that share the base model's lm_head (C2)"
            )
        heads = cls(spec.num_heads, spec.num_layers, spec.hidden_size, device)
        with torch.no_grad():
            heads.weight.copy_(weights.weight)
            if weights.bias is not None:
                heads.bias.copy_(weights.bias)
        return heads

    @property
    def num_layers(self) -> int:
        return self.weight.shape[0]

    @property
    def num_heads(self) -> int:
        return self.weight.shape[1]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states after each head's blocks, in the dtype of ``hidden``.

        Parameters
        ----------
        hidden : Tensor
            [rows, hidden], fp32, bf16 or float64; the products run in this dtype.

        Returns
        -------
        Tensor
            [num_heads, rows, hidden]
        """
        states = hidden.unsqueeze(0).expand(self.num_heads, -1, -1)
        for layer in range(self.num_layers):
            weight = self.weight[layer].to(hidden.dtype)
            bias = self.bias[layer].to(hidden.dtype).unsqueeze(1)
            states = states + functional.silu(torch.baddbmm(bias, states, weight.mT))
        return states

    def to_weights(self, vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> HeadWeights:
        """Copies on the CPU, as ``MedusaHeads`` and ``save_heads`` take them."""
        num_layers, num_heads, size = self.bias.shape
        spec = HeadSpec(num_heads, num_layers, size, vocab_size, bias=True, dtype=dtype)
        return HeadWeights(
            spec, self.weight.detach().to("cpu", dtype), self.bias.detach().to("cpu", dtype)
        )

    def checkpoint_tensors(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """Weights under the names ``{head}.{layer}.linear.weight`` and ``.bias`` on the CPU."""
        tensors = {}
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                name = f"{head}.{layer}.linear"
                weight = self.weight[layer, head].detach()
                bias = self.bias[layer, head].detach()
                tensors[f"{name}.weight"] = weight.to("cpu", dtype).contiguous()
                tensors[f"{name}.bias"] = bias.to("cpu", dtype).contiguous()
        return tensors
