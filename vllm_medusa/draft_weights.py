"""Matrices of heads that draft, as the checkpoint has them or in float8, and their products.

Both kinds are used alike.  Rounding a draft's weights changes what is proposed, never what is
emitted; and at the few rows of a draft a product takes the time in which its weights are read.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_medusa.kernels import add_update, float8_product

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
# Rounded at once: a whole lm_head in float32 would take more memory than rounding saves.
_NUMBERS_AT_ONCE = 1 << 24


@torch.no_grad()
def to_float8_rows(
    weight: torch.Tensor, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to float8_e4m3fn, each row divided by what makes its largest number 448.

    Parameters
    ----------
    weight : torch.Tensor
        ``[..., O, I]``, floating.
    device : torch.device, optional
        Where the result goes; the weight's own if left out.

    Returns
    -------
    rounded : torch.Tensor
        ``[..., O, I]`` float8_e4m3fn, contiguous.
    scale : torch.Tensor
        ``[..., O]`` float32, what the rows were divided by; 1 for rows of zeros.

    Raises
    ------
    ValueError
        A number is NaN or infinite: it would take its whole row along.

    Examples
    --------
    >>> rounded, scale = to_float8_rows(torch.tensor([[2.0, -896.0], [0.0, 0.0]]))
    >>> rounded.float().tolist(), scale.tolist()
    ([[1.0, -448.0], [0.0, 0.0]], [2.0, 1.0])
    """
    size, device = weight.shape[-1], weight.device if device is None else device
    rounded = torch.empty(weight.shape, dtype=FLOAT8, device=device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=device)
    rows_at_once = max(1, _NUMBERS_AT_ONCE // size)
    parts = (weight.reshape(-1, size), rounded.view(-1, size), scale.view(-1))
    for rows, target, factors in zip(*(part.split(rows_at_once) for part in parts), strict=True):
        numbers = rows.to(device).float()
        largest = numbers.abs().amax(dim=1) / LARGEST
        # Zero also where the largest number is too small to be divided by 448.
        factors.copy_(torch.where(largest == 0, 1.0, largest))
        # Next to float32's smallest numbers the quotient itself is rounded, and may be too small.
        target.copy_((numbers / factors[:, None]).clamp(-LARGEST, LARGEST))
    if not scale.isfinite().all():
        raise ValueError("weight: found NaN or infinity, expected finite numbers to round")
    return rounded, scale


class PlainWeight(nn.Module):
    """Matrices of some groups in their own dtype, multiplied by cuBLAS or oneDNN.

    Parameters
    ----------
    weight : torch.Tensor
        ``[G, O, I]``, copied.
    device
        Where the copy lives.
    """

    def __init__(self, weight: torch.Tensor, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = frozen(weight.detach().to(device, copy=True))

    def product(
        self,
        inputs: torch.Tensor,  # [n, I]
        group: int = 0,
        num_outputs: int | None = None,
    ) -> torch.Tensor:
        """``inputs @ weight[group].T``, [n, O], or its first ``num_outputs`` columns."""
        return functional.linear(inputs, self.weight[group, :num_outputs])

    def residual(
        self,
        inputs: torch.Tensor,  # [n, I]
        states: torch.Tensor,  # [n, O]
        bias: torch.Tensor | None,  # [O]
        group: int = 0,
    ) -> torch.Tensor:
        """A residual layer (paper, section 2.1.1): states + SiLU(product + bias), [n, O]."""
        update = self.product(inputs, group)
        out = torch.empty_like(update)
        add_update(out, states, update, bias)
        return out


class Float8Weight(nn.Module):
    """The same in float8 with a factor for each row, half the bytes of bfloat16; one launch each.

    Parameters
    ----------
    weight : torch.Tensor
        ``[G, O, I]``, rounded.
    device
        Where the rounded numbers live.
    """

    def __init__(self, weight: torch.Tensor, device: torch.device | str | None = None) -> None:
        super().__init__()
        rounded, scale = to_float8_rows(weight.detach(), device)
        # [G, O, I] float8_e4m3fn
        self.weight = frozen(rounded)
        # [G, O] float32
        self.scale = frozen(scale)

    def product(
        self, inputs: torch.Tensor, group: int = 0, num_outputs: int | None = None
    ) -> torch.Tensor:
        """As :meth:`PlainWeight.product`."""
        part = (slice(group, group + 1), slice(num_outputs))
        weight = self.weight[part]
        out = inputs.new_empty(1, len(inputs), weight.shape[1])
        float8_product(out, inputs[None], weight, self.scale[part])
        return out[0]

    def residual(
        self,
        inputs: torch.Tensor,
        states: torch.Tensor,
        bias: torch.Tensor | None,
        group: int = 0,
    ) -> torch.Tensor:
        """As :meth:`PlainWeight.residual`."""
        part = slice(group, group + 1)
        out = inputs.new_empty(1, len(inputs), self.weight.shape[1])
        float8_product(
            out, inputs[None], self.weight[part], self.scale[part],
            states=states[None], bias=None if bias is None else bias[None],
        )  # fmt: skip
        return out[0]

    def all_products(self, inputs: torch.Tensor, **layer: torch.Tensor | None) -> torch.Tensor:
        """Every group's product at once, or its residual layer.

        Parameters
        ----------
        inputs : torch.Tensor
            ``[G or 1, n, I]``.
        layer
            ``states`` [G or 1, n, O] and ``bias`` [G, O] of a residual layer.

        Returns
        -------
        torch.Tensor
            ``[G, n, O]``; a row's groups lie side by side.
        """
        groups, outputs = self.scale.shape
        out = inputs.new_empty(inputs.shape[1], groups, outputs).transpose(0, 1)
        float8_product(out, inputs, self.weight, self.scale, **layer)
        return out


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """A weight that nothing trains; a parameter, so that sleep and wake-up find it."""
    return nn.Parameter(tensor, requires_grad=False)
