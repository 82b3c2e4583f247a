"""Journal: every answer on disk as soon as it is there, so that a stopped run goes on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_medusa.training.answer_files import Answer


class Journal:
    """JSON lines beside the output: the run's settings, then one answer a line.

    Parameters
    ----------
    path : path
    settings : dict
        What an earlier run in the file must agree with.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        # Tuples come back as lists.
        settings = json.loads(json.dumps(settings))
        self.answers: list[Answer] = []
        if self.path.exists() and (lines := self._whole_lines()):
            self._check(json.loads(lines[0]), settings)
            self.answers = [_answer(json.loads(line)) for line in lines[1:]]
        else:
            self.path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, answer: Answer) -> None:
        """Keep one more answer."""
        self.answers.append(answer)
        self._file.write(json.dumps(asdict(answer)) + "\n")
        self._file.flush()

    def close(self, remove: bool = False) -> None:
        """Close the file; with ``remove`` the run is complete and the journal not needed."""
        self._file.close()
        if remove:
            self.path.unlink()

    def _whole_lines(self) -> list[str]:
        """Lines that were written to their end; a line that a kill cut short is removed."""
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return whole.splitlines()

    def _check(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{self.path} is of a run with {key} {found.get(key)!r}; expected {value!r}. "
                    "Remove it to begin anew, or use the settings it began with"
                )


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(**{**row, "pending_turns": tuple(row["pending_turns"])})
