"""ChatFormat: prompts for either role from a tokenizer's chat template."""

from typing import Any

import numpy as np
from jinja2 import TemplateError

# A text no template or tokenizer rewrites; marks where the user's words would go.
_MARK = "MEDUSAUSERTURNMARK"

Message = dict[str, str]


class ChatFormat:
    """Token prompts that make a chat model write its next answer or the user's next turn.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "tokenizer has no chat_template; expected one, since prompts are built from it. "
                "Save the tokenizer with a chat_template.jinja"
            )
        self.tokenizer = tokenizer
        self.end_ids: frozenset[int] = frozenset(
            i for i in (tokenizer.eos_token_id,) if i is not None
        )

    def answer_prompt(self, messages: list[Message]) -> list[int]:
        """Ids of the conversation so far, ending where the assistant is to speak."""
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self._encode(text)

    def user_prompt(self, messages: list[Message]) -> list[int]:
        """Ids of the conversation so far, ending where the user is to speak.

        The template renders a marker as the user's turn and the text is cut in front of it, so
        any template works that prints user messages as they are.
        """
        text = self.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": _MARK}], tokenize=False
        )
        head, mark, _ = text.rpartition(_MARK)
        if not mark:
            raise ValueError(
                "the chat template changed the user's text; self-prompts need a template that "
                "prints it unchanged. Use prompt files or template prompts instead"
            )
        return self._encode(head)

    def render_answers(self, messages: list[Message]) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids of a whole chat and which of them the assistant wrote.

        Returns
        -------
        tuple or None
            [length] int32 ids and [length] bool mask of the assistant's words with the token
            that ends each turn. None when the template refuses the chat, or renders it so that
            a longer chat does not begin like a shorter one.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            spans = [
                span
                for i, message in enumerate(messages)
                if message["role"] == "assistant"
                for span in [self._answer_span(messages, i, text)]
            ]
        except (ValueError, TypeError, KeyError, TemplateError):
            return None
        if None in spans:
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = np.array([start for start, _ in encoded["offset_mapping"]])
        mask = np.zeros(len(starts), bool)
        ids = np.array(encoded["input_ids"], np.int32)
        for start, end in spans:
            inside = (starts >= start) & (starts < end)
            # What the template puts behind the end-of-turn token, nobody wrote.
            ends = np.flatnonzero(inside & np.isin(ids, list(self.end_ids)))
            if len(ends):
                inside[ends[0] + 1 :] = False
            mask |= inside
        return ids, mask

    def _answer_span(
        self, messages: list[Message], index: int, text: str
    ) -> tuple[int, int] | None:
        """Characters of an answer with its end of turn within the whole chat's text."""
        before = self.tokenizer.apply_chat_template(
            messages[:index], tokenize=False, add_generation_prompt=True
        )
        after = self.tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not after.startswith(before) or not text.startswith(after):
            return None
        return len(before), len(after)

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens and outer blanks."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
