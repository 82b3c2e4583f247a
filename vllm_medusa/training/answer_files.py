"""Answer files: what `distill` writes and `train` reads, as ids or as chats with a template."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_medusa.training.chat_format import ChatFormat, Message
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.prompt_files import CHAT_KEYS, USER_ROLES, read_rows

OUTPUT_SUFFIXES = (".safetensors", ".jsonl", ".parquet")
_ASSISTANT = ("assistant", "gpt", "bing", "chatgpt")


@dataclass(frozen=True)
class Answer:
    """One answer of the model, with all that led to it."""

    # the conversation up to the user's turn that is answered
    messages: list[Message]
    prompt_token_ids: list[int]
    answer_token_ids: list[int]
    kind: str = "greedy"
    # whether the model ended its turn itself
    finished: bool = True
    # given user turns that are still to come
    pending_turns: tuple[str, ...] = ()


def check_output(path: str | Path) -> Path:
    """Refuse an output file whose suffix tells no format."""
    path = Path(path)
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"output {path} has suffix {path.suffix!r}; expected {', '.join(OUTPUT_SUFFIXES)}"
        )
    return path


def write_answers(path: str | Path, answers: Sequence[Answer], metadata: dict[str, str]) -> None:
    """Write one file; its suffix chooses token ids only, JSON lines or Parquet."""
    path = check_output(path)
    if path.suffix == ".safetensors":
        pairs = ((a.prompt_token_ids, a.answer_token_ids) for a in answers)
        ConversationSet.from_pairs(pairs).save(path, metadata)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(asdict(a)) + "\n" for a in answers), encoding="utf-8")
    else:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_pylist([asdict(a) for a in answers])
        parquet.write_table(table.replace_schema_metadata(metadata), path)


def load_answers(
    paths: Iterable[str | Path], tokenizer: Any = None
) -> tuple[ConversationSet, Counter[str]]:
    """Read answer files of any kind and count what could not be used.

    Parameters
    ----------
    paths : iterable of path
        ``.safetensors``; or ``.jsonl``, ``.json``, ``.parquet`` whose rows hold
        ``prompt_token_ids`` and ``answer_token_ids``, or a chat (``messages`` or ShareGPT's
        ``conversations``) whose assistant turns are the answers.
    tokenizer : optional
        Of the base model; needed for chats, which its template renders.

    Returns
    -------
    ConversationSet
    Counter
        Reason -> rows left out.
    """
    parts: list[ConversationSet] = []
    skipped: Counter[str] = Counter()
    for path in map(Path, paths):
        if path.suffix == ".safetensors":
            parts.append(ConversationSet.load(path))
        else:
            rows = read_rows(path)
            parts.append(_from_rows(path, rows, tokenizer, skipped))
    if not parts:
        raise ValueError("no answer file given; expected at least one path")
    joined = _join(parts)
    if not joined.answer_mask.any():
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise ValueError(f"the data holds no answer ({reasons or 'no rows'})")
    return joined, skipped


def _join(parts: Sequence[ConversationSet]) -> ConversationSet:
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return ConversationSet(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.answer_mask for part in parts]),
        np.cumsum([0, *lengths], dtype=np.int64),
    )


def _from_rows(
    path: Path, rows: Iterator[Any], tokenizer: Any, skipped: Counter[str]
) -> ConversationSet:
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    chat = None
    for number, row in enumerate(rows, 1):
        where = f"{path}:{number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: found {str(row)[:60]!r}; expected an object")
        if "answer_token_ids" in row:
            prompt, answer = row["prompt_token_ids"], row["answer_token_ids"]
            ids.append(np.array([*prompt, *answer], np.int32))
            masks.append(np.arange(len(ids[-1])) >= len(prompt))
            continue
        messages = _messages(row, where)
        if not any(message["role"] == "assistant" for message in messages):
            skipped["no assistant turn"] += 1
            continue
        if chat is None:
            if tokenizer is None:
                raise ValueError(f"{where} is a chat; expected a tokenizer to render it with")
            chat = ChatFormat(tokenizer)
        rendered = chat.render_answers(messages)
        if rendered is None:
            skipped["the chat template cannot render it"] += 1
            continue
        ids.append(rendered[0])
        masks.append(rendered[1])
    if not ids and not skipped:
        raise ValueError(f"{path} is empty; expected one conversation a row")
    return ConversationSet(
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        np.concatenate(masks) if masks else np.zeros(0, bool),
        np.cumsum([0, *map(len, ids)], dtype=np.int64),
    )


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    for key, role, content in CHAT_KEYS:
        if isinstance(row.get(key), list):
            return [
                {"role": _role(str(m.get(role))), "content": str(m.get(content) or "")}
                for m in row[key]
            ]
    raise ValueError(
        f"{where}: expected 'answer_token_ids', 'messages' or 'conversations', found the keys "
        f"{sorted(row)}"
    )


def _role(name: str) -> str:
    if name in _ASSISTANT:
        return "assistant"
    return "user" if name in USER_ROLES else name
