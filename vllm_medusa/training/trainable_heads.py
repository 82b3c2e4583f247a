"""TrainableHeads: residual blocks of all heads with fp32 master weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional


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

    def load_checkpoint_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`checkpoint_tensors`; the name sets must agree exactly."""
        expected = set(self.checkpoint_tensors())
        if set(tensors) != expected:
            raise ValueError(
                f"checkpoint holds {sorted(tensors)}; expected {sorted(expected)} for "
                f"{self.num_heads} heads of {self.num_layers} layers"
            )
        with torch.no_grad():
            for head in range(self.num_heads):
                for layer in range(self.num_layers):
                    name = f"{head}.{layer}.linear"
                    self.weight[layer, head].copy_(tensors[f"{name}.weight"])
                    self.bias[layer, head].copy_(tensors[f"{name}.bias"])
