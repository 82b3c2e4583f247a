"""What a walk over the trees of a batch writes, as named groups of tensors; no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .checks import word_axis


class WalkOutput(NamedTuple):
    """Outputs of ``tree_walk`` for R requests with `num_logits` rows in all.

    Examples
    --------
    Rows 0, 2, 3 of a request with 4 rows accepted and token 5 drawn at row 3: tokens ``8 9 5`` then
    the mask ``0b1101`` in the last of 4 columns, 3 sampled, 1 rejected, last row 3, flat rows
    ``0 2 3 3``.
    """

    tokens: torch.Tensor  # [>= R, N + 1] int64, drawn at the accepted rows, -1 behind; path mask
    num_sampled: torch.Tensor  # [>= R] int32
    num_rejected: torch.Tensor  # [>= R] int32
    # [>= R] int64, bit b: row b is on the accepted path; [>= R, 2] for trees of more than 64 rows
    path_masks: torch.Tensor
    root_positions: torch.Tensor  # [>= R] int64, position of the root row
    last_rows: torch.Tensor  # [>= R] int64, flat row that ends the path
    flat_rows: torch.Tensor | None = None  # [>= num_logits] int64, accepted rows first
    hidden: torch.Tensor | None = None  # [>= R, hidden_size], hidden state of the last row

    @classmethod
    def empty(
        cls,
        num_reqs: int,
        num_logits: int,
        num_columns: int,
        device: torch.device,
        num_rows: int | None = None,
    ) -> WalkOutput:
        """Allocate everything but `hidden`; `num_rows` of a tree, if not `num_columns`."""

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            tokens=empty(num_reqs, num_columns),
            num_sampled=empty(num_reqs, dtype=torch.int32),
            num_rejected=empty(num_reqs, dtype=torch.int32),
            path_masks=empty(num_reqs, *word_axis(num_rows or num_columns)),
            root_positions=empty(num_reqs),
            last_rows=empty(num_reqs),
            flat_rows=empty(num_logits),
        )


class RequestState(NamedTuple):
    """What every request slot knows, advanced in place by ``tree_walk``."""

    num_computed_tokens: torch.Tensor  # [max_num_reqs] int32
    last_sampled: torch.Tensor  # [max_num_reqs] int64
    total_len: torch.Tensor  # [max_num_reqs] int32, prompt and output
    all_token_ids: torch.Tensor  # [max_num_reqs, max_model_len] int32
    output_counts: torch.Tensor | None = None  # [max_num_reqs, vocab_size] int32
