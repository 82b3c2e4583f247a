"""A benchmark's record as cells: each is written when it is measured, and skipped the next time."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from records import earlier_record, write_record

from vllm_medusa.provenance import git_sha

QUESTIONS = Path(__file__).parent / "data" / "mt_bench_questions.jsonl"


def add_options(
    parser: argparse.ArgumentParser, *, max_tokens: int, rounds: int, concurrency: list[int]
) -> None:
    """Options that every benchmark of engines has, with the defaults that differ."""
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write or extend")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="start nothing that would probably end later; the next call goes on",
    )
    parser.add_argument("--model", required=True, help="target model directory")
    parser.add_argument("--heads", required=True, help="Medusa heads")
    parser.add_argument("--label", default=None, help="how tables name the model")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--max-tokens", type=int, default=max_tokens)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--concurrency", type=int, nargs="+", default=concurrency)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--enforce-eager", action="store_true", help="start fast, run slowly")
    parser.add_argument("--max-num-seqs", type=int, default=None)
    parser.add_argument(
        "--kv-cache-gb",
        type=float,
        default=None,
        help="of each engine; without it none starts beside another, as each profiles free memory",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn: greedily, unless told."""
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--top-p", type=float, default=None, help="where the temperature is not 0")
    parser.add_argument("--top-k", type=int, default=None, help="where the temperature is not 0")


def sampling_filters(args: argparse.Namespace) -> dict[str, float | None]:
    """What leaves tokens out of the draw, as vLLM names it; None where it is off.

    Benchmarks without :func:`add_sampling_options` have none.
    """
    return {name: getattr(args, name, None) for name in ("top_p", "top_k")}


def record_head(args: argparse.Namespace, benchmark: str, load: str) -> dict[str, Any]:
    """What options say about all cells of a record.

    ``load`` (load.py) is among it: a record of the other load is refused, not extended.
    """
    name = Path(args.model).name
    return {
        "benchmark": benchmark, "load": load, "model": name, "heads": Path(args.heads).name,
        "label": args.label or name, "max_tokens": args.max_tokens, "rounds": args.rounds,
        **sampling_filters(args),
    }  # fmt: skip


class Cells:
    """The cells of one record, by key.

    Parameters
    ----------
    path : pathlib.Path
        The record; cells that it holds already are kept.
    head : dict
        What all cells have in common: benchmark, model, settings. JSON types only.
    time_limit : float
        Seconds from now.

    Raises
    ------
    ValueError
        The record was made with other settings.
    """

    def __init__(self, path: Path, head: dict[str, Any], time_limit: float = float("inf")):
        self.path, self.head = path, head
        self._end = time.monotonic() + time_limit
        old = earlier_record(path, head)
        self.cells: list[dict[str, Any]] = [] if old is None else old["cells"]

    def __contains__(self, key: dict[str, Any]) -> bool:
        return any(cell["key"] == key for cell in self.cells)

    def add(self, key: dict[str, Any], values: dict[str, Any]) -> None:
        """Write the record with one more cell, or with a new one in place of an old."""
        self.remove(key)
        # Calls that extend a record may come from different commits.
        self.cells.append({"key": key, "git_sha": git_sha(), **values})
        write_record(self.path, {**self.head, "cells": self.cells})

    def remove(self, key: dict[str, Any]) -> None:
        """Forget a cell; the record is written with the next one."""
        self.cells = [cell for cell in self.cells if cell["key"] != key]

    def has_time(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return time.monotonic() + seconds <= self._end
