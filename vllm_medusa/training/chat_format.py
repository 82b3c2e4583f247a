"""ChatFormat: prompts for either role from a tokenizer's chat template."""

from typing import Any

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

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens and outer blanks."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
