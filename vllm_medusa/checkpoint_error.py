"""CheckpointError: why a checkpoint is refused, and what to do."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is.

    Parameters
    ----------
    file
        File or directory at fault.
    key
        Tensor or config key at fault, None when the whole file is.
    found, expected, remedy
        Texts that complete "found .., expected ..; ..".
    """

    def __init__(
        self, file: Path | str, key: str | None, found: str, expected: str, remedy: str
    ) -> None:
        where = f"{file}: {key}" if key else f"{file}"
        super().__init__(_one_line(f"{where}: found {found}, expected {expected}; {remedy}"))
        self.file, self.key = file, key
        self.found, self.expected, self.remedy = found, expected, remedy


def _one_line(text: str) -> str:
    """Names come from the file and may hold anything; control characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
