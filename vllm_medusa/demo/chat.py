"""One question through the OpenAI API, streamed, with its time and token count."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm_medusa.demo.failure import StepError

ANSWER_LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: int
    seconds: float  # from sending the question to the last token

    @property
    def tokens_per_second(self) -> float:
        """Speed, the prompt's processing included."""
        return self.tokens / self.seconds


def ask(
    url: str, model: str, question: str, max_tokens: int, show: Callable[[str], None]
) -> Answer:
    """Ask one question at temperature 0 and hand each piece of text to ``show``.

    Parameters
    ----------
    url : str
        Root of an OpenAI-compatible server.
    model, question : str
        Served model name and the user's message.
    max_tokens : int
        Longest answer.
    show : callable
        Called with each piece of text as it arrives.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    pieces, tokens = [], 0
    begun = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_SECONDS) as stream:
            for event in events(stream):
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    pieces.append(piece)
                    show(piece)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except OSError as problem:
        raise StepError(
            f"The server did not answer the question {question!r} ({problem}): see its log in the "
            "cache folder under logs, and run the same command again."
        ) from problem
    seconds = time.perf_counter() - begun
    if not tokens:
        raise StepError(
            f"The server answered {question!r} with nothing: see its log in the cache folder "
            "under logs."
        )
    return Answer("".join(pieces), tokens, seconds)


def events(lines) -> Iterator[dict]:
    """Yield the JSON objects of a server-sent event stream."""
    for line in lines:
        text = line.decode().strip()
        if text.startswith("data:") and text != "data: [DONE]":
            yield json.loads(text.removeprefix("data:"))
