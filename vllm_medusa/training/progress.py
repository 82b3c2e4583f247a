"""One progress bar for all long loops of training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(label: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show a bar; yields ``advance(count, note="")``.

    Off a terminal Rich prints the bar once, at its end, so logs stay short.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(count: int, note: str = "") -> None:
            progress.update(task, advance=count, **({"note": note} if note else {}))

        yield advance
