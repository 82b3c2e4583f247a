"""What the demo shows: progress bars, streamed answers, the final tables."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.rule import Rule
from rich.table import Table

from vllm_medusa.demo.acceptance import Acceptance
from vllm_medusa.demo.chat import Answer

# Wide enough for the table where output goes to a file.
PLAIN_WIDTH = 110

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=PLAIN_WIDTH)


@dataclass(frozen=True)
class Comparison:
    """One question, answered with and without Medusa."""

    question: str
    medusa: Answer
    plain: Answer
    acceptance: Acceptance

    @property
    def same_text(self) -> bool:
        """Whether both servers gave the same answer to the letter."""
        return self.medusa.text == self.plain.text


@contextmanager
def progress_bar() -> Iterator:
    """Show one bar; yields a function of (what, done, total)."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield update


def step(text: str) -> None:
    """Announce the next step."""
    console.print(f"[bold]{text}[/bold]")


def question(text: str) -> None:
    """Show a question above its streamed answer."""
    console.print(Rule(style="dim"))
    console.print(text, style="bold cyan", markup=False)


def stream(piece: str) -> None:
    """Show a piece of an answer as it arrives."""
    console.print(piece, end="", markup=False, soft_wrap=True)


def answer_line(answer: Answer, acceptance: Acceptance) -> None:
    """Close a streamed answer with its numbers."""
    console.print(
        f"\n{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s, "
        f"{acceptance.tokens_per_step:.2f} tokens per step",
        style="dim",
    )


def tables(rows: Sequence[Comparison], total: Acceptance) -> None:
    """Print the comparison and the acceptance by depth."""
    console.print()
    console.print(comparison_table(rows, total))
    console.print(acceptance_table(total))
    different = sum(not row.same_text for row in rows)
    if different:
        console.print(
            f"{different} of {len(rows)} answers differ in wording. In bf16 that happens where two "
            "tokens are nearly tied: a pass over several tokens rounds a little differently from "
            "a pass over one. ARGS='--dtype float32' makes such ties rare, to check."
        )


def comparison_table(rows: Sequence[Comparison], total: Acceptance) -> Table:
    """Build the table of questions with a line of totals."""
    table = Table(title="vLLM with and without Medusa, temperature 0, one question at a time")
    table.add_column("Question", max_width=40)
    titles = ("tokens", "tok/s plain", "tok/s Medusa", "speed-up", "tokens per step", "same answer")
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        plain, medusa = row.plain.tokens_per_second, row.medusa.tokens_per_second
        table.add_row(
            row.question,
            str(row.medusa.tokens),
            f"{plain:.1f}",
            f"{medusa:.1f}",
            f"{medusa / plain:.2f}x",
            f"{row.acceptance.tokens_per_step:.2f}",
            "yes" if row.same_text else "no",
        )
    plain, medusa = total_speed([row.plain for row in rows]), total_speed([r.medusa for r in rows])
    table.add_section()
    table.add_row(
        "all",
        str(sum(row.medusa.tokens for row in rows)),
        f"{plain:.1f}",
        f"{medusa:.1f}",
        f"{medusa / plain:.2f}x",
        f"{total.tokens_per_step:.2f}",
        f"{sum(row.same_text for row in rows)} of {len(rows)}",
    )
    return table


def total_speed(answers: Sequence[Answer]) -> float:
    """Return tokens per second over several answers.

    Examples
    --------
    >>> total_speed([Answer("a", 30, 1.0), Answer("b", 30, 2.0)])
    20.0
    """
    return sum(a.tokens for a in answers) / sum(a.seconds for a in answers)


def acceptance_table(total: Acceptance) -> Table:
    """Build the table of how deep into the tree the model agreed with the heads."""
    rates = total.rate_by_depth
    title = f"Acceptance by depth, share of {total.steps} steps"
    table = Table(title=title)
    for depth in range(1, len(rates) + 1):
        table.add_column(f"depth {depth}", justify="right")
    if rates:
        table.add_row(*(f"{rate:.0%}" for rate in rates))
    return table
