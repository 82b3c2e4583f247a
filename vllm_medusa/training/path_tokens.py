"""Embeddings of the tokens between a row's hidden state and its heads' labels."""

import torch
from torch import Tensor


def path_embeddings(
    # [rows, at least num_heads] integers, column j the token t + j + 1; negative: none
    labels: Tensor,
    num_heads: int,
    # [vocab, hidden]
    embeddings: Tensor | None,
) -> Tensor:
    """[rows, num_heads, hidden]: column j is what heads j+1 and later see of token t + j + 1.

    Rows without a token get zeros. No head that has a label looks at them: labels end together
    with the answer, and a head's path ends before its label.
    """
    if embeddings is None:
        raise ValueError("embeddings: found None; sequential heads need the base's embeddings")
    tokens = labels[:, :num_heads].long()
    found = embeddings[tokens.clamp(min=0)]
    return torch.where((tokens >= 0).unsqueeze(2), found, 0)
