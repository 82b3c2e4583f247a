"""Floating point operations of training heads on one answer token."""

from __future__ import annotations

from typing import Any


def head_flop(row: dict[str, Any]) -> int:
    """Forward and backward of all heads on one token.

    A product of n weights takes 2n forward, 2n for its input's gradient and 2n for its own. The
    first block's input is the base's and a shared lm_head is frozen, so these need one less.

    >>> kind = {"num_heads": 1, "num_layers": 1, "hidden_size": 10, "vocab_size": 100}
    >>> head_flop(kind), head_flop({**kind, "lm_head": "own"})
    (4400, 6400)
    """
    heads, hidden = row["num_heads"], row["hidden_size"]
    square = hidden * hidden
    # Sequential heads: one matrix for every token of every head's path, its input frozen.
    path = heads * (heads + 1) // 2 * 4 * square if row.get("sequential") else 0
    output = 4 if row.get("lm_head", "shared") == "shared" else 6
    each = (6 * row["num_layers"] - 2) * square + output * hidden * row["vocab_size"]
    return heads * each + path


def base_flop(row: dict[str, Any]) -> float:
    """Forward of a base that runs on line, its prompts' share included; 0 where none does.

    Its embeddings are looked up and its lm_head is not run. Attention is causal: half of
    ``length`` keys on average, for products with keys and with values.
    """
    if "base_parameters" not in row:
        return 0.0
    length = row["prompt_tokens"] + row["answer_tokens"]
    weights = row["base_parameters"] - 2 * row["vocab_size"] * row["hidden_size"]
    attention = 2 * length * row["hidden_size"] * row["base_layers"]
    return (2 * weights + attention) * length / row["answer_tokens"]
