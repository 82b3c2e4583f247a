"""A tokenizer of single characters for the tiny model's vocabulary."""

from __future__ import annotations

from pathlib import Path

from tiny import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")
# Printable ASCII in byte-level spelling, without the two least useful characters.
CHARACTERS = [chr(code) for code in range(0x21, 0x7F) if chr(code) not in "`~"]


def text(token_ids: list[int]) -> str:
    """What the ids spell; special tokens spell nothing."""
    spelled = [*[""] * len(SPECIAL), " ", *CHARACTERS]
    return "".join(spelled[token] for token in token_ids)


def write_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE without merges: 3 special tokens, space and 92 characters."""
    tokens = [*SPECIAL, "\u0120", *CHARACTERS]
    assert len(tokens) == VOCAB
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(directory)
    return fast
