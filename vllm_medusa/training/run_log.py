"""RunLog: one JSON line per logged step, a plot of them, and TensorBoard where wanted."""

import json
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"
PLOT_FILE = "losses.png"


class RunLog:
    """Log of a training run.

    Parameters
    ----------
    directory : path or None
        Folder of ``log.jsonl``; None keeps nothing.
    tensorboard : bool
        Also write TensorBoard events into ``directory/tensorboard``.
    """

    def __init__(self, directory: str | Path | None, tensorboard: bool = False) -> None:
        self.path = Path(directory) / LOG_FILE if directory is not None else None
        self._board = _board(Path(directory)) if tensorboard and directory is not None else None

    def write(self, step: int, **values: Any) -> None:
        """Append one step; lists become one curve an entry."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in _curves(values).items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def cut(self, step: int) -> None:
        """Forget what was logged after ``step``: a resumed run writes it again."""
        if self.path is None or not self.path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(self.path)

    def restart(self) -> None:
        """Begin anew: the log of an earlier run in the folder is removed."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """Return all logged steps."""
        if self.path is None or not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that a killed run was writing
        return rows

    def plot(self) -> Path | None:
        """Draw every curve whose name holds "loss" over the steps, where matplotlib is there."""
        rows = self.rows()
        if self.path is None or not rows:
            return None
        try:
            import matplotlib
        except ImportError:
            # The training is done: its result must not be lost for a picture of it.
            print(f"no {PLOT_FILE}: matplotlib is not installed; {self.path} holds the numbers")
            return None
        matplotlib.use("Agg")
        from matplotlib import pyplot

        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            for name, value in _curves(row).items():
                if "loss" in name:
                    series.setdefault(name, []).append((row["step"], value))
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
        figure.tight_layout()
        path = self.path.with_name(PLOT_FILE)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return path


def _curves(values: dict[str, Any]) -> dict[str, float]:
    """Numbers by name; entry k of a list gets the number k, from 1.

    >>> _curves({"step": 3, "head_losses": [2.0, 1.0], "stage": "joint"})
    {'step': 3, 'head_losses/1': 2.0, 'head_losses/2': 1.0}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            found |= {f"{name}/{k}": entry for k, entry in enumerate(value, 1)}
        elif isinstance(value, int | float):
            found[name] = value
    return found


def _board(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard is True, but it is not installed; pip install tensorboard, or read "
            f"{LOG_FILE}, which holds the same numbers"
        ) from None
    return SummaryWriter(str(directory / "tensorboard"))
