"""Prompt files: user turns from text, JSON, JSON lines and Parquet in the published layouts."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Role names of the published sets that stand for the user.
USER_ROLES = ("user", "human", "prompter")
# Key of a chat's messages, and in each message those of the role and the text: plain, ShareGPT.
CHAT_KEYS = (("messages", "role", "content"), ("conversations", "from", "value"))
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_LAYOUTS = (
    "a string or an object with 'turns', 'prompt', 'messages' (role, content), 'conversations' "
    "(ShareGPT: from, value), 'instruction' (Alpaca), 'data' (UltraChat) or 'prompt_token_ids'"
)


@dataclass(frozen=True)
class Prompt:
    """One conversation to hold: its user turns in order, or the ids of a single prompt."""

    turns: tuple[str, ...] = ()
    category: str = "all"
    token_ids: tuple[int, ...] | None = None


@dataclass
class PromptFile:
    """Usable prompts of one file and why its other rows were left out."""

    path: Path
    prompts: list[Prompt] = field(default_factory=list)
    # reason -> rows
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def turns(self) -> list[list[str]]:
        """User turns of every prompt that is text."""
        return [list(prompt.turns) for prompt in self.prompts if prompt.turns]


def read_prompts(path: str | Path) -> PromptFile:
    """Read a prompt file.

    Parameters
    ----------
    path : path
        ``.txt``: one single-turn prompt a line. ``.jsonl``, ``.json`` (a list) and ``.parquet``:
        rows in any layout of FasterDecoding's, ShareGPT's, UltraChat's or Alpaca's data. Only
        the user's turns are kept, since answers come from the model itself.

    Returns
    -------
    PromptFile
        Rows without a user turn are counted in ``skipped``.

    Raises
    ------
    ValueError
        For an empty file, one without a single usable prompt, and rows of an unknown layout.
    """
    path = Path(path)
    found = PromptFile(path)
    number = 0
    for number, row in enumerate(read_rows(path), 1):
        prompt = _prompt(row, f"{path}:{number}")
        if prompt.turns or prompt.token_ids:
            found.prompts.append(prompt)
        else:
            found.skipped["no user turn"] += 1
    if not found.prompts:
        what = f"holds {number} rows, none with a user turn" if number else "is empty"
        raise ValueError(f"prompt file {path} {what}; expected one prompt a row")
    return found


def choose_prompts(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first prompts, taking categories in turn."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    longest = max(map(len, groups.values()), default=0)
    turns = [group[i] for i in range(longest) for group in groups.values() if i < len(group)]
    return turns[:limit]


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a .txt, .jsonl, .json or .parquet file."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"file {path} has suffix {path.suffix!r}; expected {', '.join(_SUFFIXES)}"
        )
    if path.suffix == ".parquet":
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            for batch in ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file: {error}") from None
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = _decode(text, str(path)) if text.strip() else []
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}; expected a list")
        yield from rows
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield line.strip() if path.suffix == ".txt" else _decode(line, f"{path}:{number}")


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _prompt(row: Any, where: str) -> Prompt:
    if isinstance(row, str):
        return Prompt(_texts([row]))
    if isinstance(row, Mapping):
        category = str(row.get("category") or "all")
        ids = row.get("prompt_token_ids")
        if ids is not None:
            if not all(isinstance(i, int) for i in ids):
                raise ValueError(f"{where}: prompt_token_ids holds {ids!r}; expected integers")
            return Prompt((), category, tuple(ids))
        turns = _turns(row, where)
        if turns is not None:
            return Prompt(_texts(turns), category)
    raise ValueError(f"{where}: expected {_LAYOUTS}, found {str(row)[:80]!r}; convert the row")


def _turns(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """User turns of a row, None when the layout is unknown."""
    if isinstance(row.get("turns"), list):
        return row["turns"]
    for key, role, content in CHAT_KEYS:
        if isinstance(row.get(key), list):
            return [_content(m, role, content, where) for m in row[key] if _is_user(m, role)]
    if isinstance(row.get("prompt"), str):
        return [row["prompt"]]
    if isinstance(row.get("instruction"), str):
        given = row.get("input")
        return [f"{row['instruction']}\n\n{given}" if given else row["instruction"]]
    if isinstance(row.get("data"), list):
        return row["data"][::2]  # UltraChat alternates, the user first
    return None


def _is_user(message: Any, role: str) -> bool:
    return isinstance(message, Mapping) and message.get(role) in USER_ROLES


def _content(message: Mapping[str, Any], role: str, content: str, where: str) -> Any:
    if content not in message:
        raise ValueError(f"{where}: a message with {role!r} lacks {content!r}; expected its text")
    return message[content]


def _texts(turns: list[Any]) -> tuple[str, ...]:
    """Turns up to the first that is no text: what follows it would answer nothing."""
    kept: list[str] = []
    for turn in turns:
        if not isinstance(turn, str) or not turn.strip():
            break
        kept.append(turn.strip())
    return tuple(kept)
