"""HeadSpec and HeadWeights: what Medusa heads are, and their tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Tensor fields of HeadWeights, which MedusaHeads holds under the same names.
TENSORS = ("weight", "bias", "lm_head", "token_map", "lm_head_down", "path_weight")


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Shape of a set of Medusa heads (paper section 2.1.1).

    Parameters
    ----------
    num_heads
        K; head k (from 1) predicts the token k+1 positions ahead.
    num_layers
        L independent residual layers per head; 0 leaves the hidden state as it is.
    hidden_size
        d of the base model.
    vocab_size
        V of the base model; None when neither the file nor the caller knows it.
    bias
        Whether the layers have biases (the paper's formula has none, the
        published checkpoints do).
    own_lm_head
        Whether the checkpoint brings output matrices; else the base's is used.
    common_lm_head
        With ``own_lm_head``: one matrix serves all heads.
    vocab_subset_size
        V' when heads only score a subset of the vocabulary, else None.
    vocab_subset_per_head
        Whether every head has a subset of its own.
    dtype
        Of every weight.
    lm_head_rank
        r when own lm_heads are products ``[V', r] · [r, d]`` (SlimSpec), else None.
    sequential
        Whether head k also sees the tokens on the path up to its own (Hydra).
    """

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int | None = None
    bias: bool = False
    own_lm_head: bool = False
    common_lm_head: bool = False
    vocab_subset_size: int | None = None
    vocab_subset_per_head: bool = False
    dtype: torch.dtype = torch.bfloat16
    lm_head_rank: int | None = None
    sequential: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_heads", 1), ("num_layers", 0), ("hidden_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"HeadSpec.{name}: found {value}, expected at least {least}")
        if not self.dtype.is_floating_point:
            raise ValueError(
                f"HeadSpec.dtype: found {self.dtype}, expected a floating-point dtype such as "
                "torch.bfloat16"
            )
        if self.common_lm_head and not self.own_lm_head:
            raise ValueError("HeadSpec.common_lm_head: True needs own_lm_head=True")
        if self.lm_head_rank is not None and not (
            self.own_lm_head and 1 <= self.lm_head_rank <= self.hidden_size
        ):
            raise ValueError(
                f"HeadSpec.lm_head_rank: found {self.lm_head_rank}, expected own lm_heads and "
                f"1..hidden_size ({self.hidden_size})"
            )
        if self.sequential and self.num_layers == 0:
            raise ValueError("HeadSpec.sequential: True needs num_layers of at least 1")
        if self.vocab_subset_per_head and self.vocab_subset_size is None:
            raise ValueError("HeadSpec.vocab_subset_per_head: True needs vocab_subset_size")
        if self.own_lm_head and self.output_size is None:
            raise ValueError(
                "HeadSpec.vocab_size: found None, but own lm_heads need their number of rows; "
                "give vocab_size or vocab_subset_size"
            )
        if None not in (self.vocab_subset_size, self.vocab_size) and not (
            1 <= self.vocab_subset_size <= self.vocab_size
        ):
            raise ValueError(
                f"HeadSpec.vocab_subset_size: found {self.vocab_subset_size}, expected "
                f"1..vocab_size ({self.vocab_size})"
            )

    @property
    def output_size(self) -> int | None:
        """V': logits per head before the token map, None when V is unknown."""
        return self.vocab_size if self.vocab_subset_size is None else self.vocab_subset_size

    @property
    def num_lm_heads(self) -> int:
        """Number of output matrices held: 0 (base's), 1 (common) or K."""
        if not self.own_lm_head:
            return 0
        return 1 if self.common_lm_head else self.num_heads

    @property
    def lm_head_width(self) -> int:
        """Columns of an own lm_head: its rank, or the hidden size."""
        return self.hidden_size if self.lm_head_rank is None else self.lm_head_rank

    @property
    def num_path_weights(self) -> int:
        """Matrices of sequential heads: head k has one for each of its k path tokens."""
        return self.num_heads * (self.num_heads + 1) // 2 if self.sequential else 0

    @property
    def num_token_maps(self) -> int:
        """Number of vocabulary subsets held: 0, 1 (common) or K."""
        if self.vocab_subset_size is None:
            return 0
        return self.num_heads if self.vocab_subset_per_head else 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Shape of every tensor in :data:`TENSORS`, None for those that such heads do not have."""
        heads, size = self.num_heads, self.hidden_size
        stack = (self.num_layers, heads, size)
        lm_head = (self.num_lm_heads, self.output_size, self.lm_head_width)
        return {
            "weight": (*stack, size),
            "bias": stack if self.bias else None,
            "lm_head": lm_head if self.own_lm_head else None,
            "token_map": (self.num_token_maps, self.vocab_subset_size)
            if self.num_token_maps
            else None,
            "lm_head_down": None
            if self.lm_head_rank is None
            else (heads, self.lm_head_rank, size),
            "path_weight": (self.num_path_weights, size, size) if self.sequential else None,
        }

    def zero_parameters(
        self, dtype: torch.dtype, device: torch.device | str | None
    ) -> dict[str, torch.nn.Parameter | None]:
        """New parameters of every trained tensor, all zero; None where there is none."""
        return {
            name: None
            if shape is None
            else torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            for name, shape in self.shapes.items()
            if name != "token_map"
        }

    @property
    def num_parameters(self) -> int:
        """Number of trained weights (token maps are not)."""
        layer = self.hidden_size * (self.hidden_size + int(self.bias))
        lm_heads = self.num_lm_heads * self.lm_head_width * (self.output_size or 0)
        down = self.num_heads * (self.lm_head_rank or 0) * self.hidden_size
        paths = self.num_path_weights * self.hidden_size**2
        return self.num_heads * self.num_layers * layer + lm_heads + down + paths


@dataclasses.dataclass
class HeadWeights:
    """Tensors of all heads, stacked, and where they came from.

    Parameters
    ----------
    format
        Letter of the checkpoint format (``checkpoint_formats.FORMATS``).
    metadata
        ``base_model_name_or_path`` (str or None), ``config`` (decoded
        config.json), ``dequantised`` and ``tied_layers`` when true.
    """

    spec: HeadSpec
    # [num_layers, num_heads, hidden_size, hidden_size], spec.dtype
    weight: torch.Tensor
    # [num_layers, num_heads, hidden_size], spec.dtype
    bias: torch.Tensor | None = None
    # [num_lm_heads, output_size, lm_head_width], spec.dtype
    lm_head: torch.Tensor | None = None
    # [num_token_maps, output_size] int64: head's vocabulary id -> base vocabulary id
    token_map: torch.Tensor | None = None
    # [num_heads, lm_head_rank, hidden_size], spec.dtype
    lm_head_down: torch.Tensor | None = None
    # [num_path_weights, hidden_size, hidden_size], spec.dtype: head 1's one matrix, head 2's two..
    path_weight: torch.Tensor | None = None
    format: str = "C2"
    source_files: tuple[Path, ...] = ()
    tree_path: Path | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in self.spec.shapes.items():
            tensor = getattr(self, name)
            dtype = torch.int64 if name == "token_map" else self.spec.dtype
            expected = None if shape is None else (shape, dtype)
            found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            if found != expected:
                raise ValueError(
                    f"HeadWeights.{name}: found {found}, expected {expected} by the spec; build "
                    "spec and tensors from the same checkpoint"
                )

    def first_heads(self, num_heads: int) -> HeadWeights:
        """The same checkpoint with only its first heads (a tree may not reach the rest)."""
        if not 1 <= num_heads <= self.spec.num_heads:
            raise ValueError(
                f"first_heads: found {num_heads}, expected 1..{self.spec.num_heads}, the heads held"
            )

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            # Common matrices and maps have one row for all heads.
            return None if tensor is None else tensor[:num_heads]

        return dataclasses.replace(
            self,
            spec=dataclasses.replace(self.spec, num_heads=num_heads),
            weight=self.weight[:, :num_heads],
            bias=None if self.bias is None else self.bias[:, :num_heads],
            lm_head=cut(self.lm_head),
            token_map=cut(self.token_map),
            lm_head_down=cut(self.lm_head_down),
            path_weight=None
            if self.path_weight is None
            else self.path_weight[: num_heads * (num_heads + 1) // 2],
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (getattr(self, name) for name in TENSORS)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
