"""Time to the first token, and what the plugin costs where it is off.

    python benchmarks/bench_latency.py --model MODEL --heads HEADS --out record.json

Three engines at once, taking turns: vLLM with the plugin absent (``VLLM_PLUGINS=''``), with the
plugin installed and off, and with Medusa. Every step's tokens are handed out, as in a stream.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

from cells import Cells, add_options, record_head
from compare import STOCK, WARM_UP_TOKENS, engine_arguments
from engine_process import EngineProcess
from records import spread

from vllm_medusa.training.prompt_files import choose_prompts, read_prompts

SIDES = ("stock", "plugin off", "medusa")


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, max_tokens=96, rounds=3, concurrency=[1, 8, 32])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--num-questions", type=int, default=24, help="thrice the level if more")
    parser.add_argument("--max-model-len", type=int, default=2048)
    return parser.parse_args()


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of them do not exceed.

    Examples
    --------
    >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5), percentile([1.0, 2.0], 0.9)
    (2.0, 2.0)
    """
    ordered = sorted(values)
    return next(v for i, v in enumerate(ordered, start=1) if i >= share * len(ordered))


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """First-token times over all rounds, throughput by round."""
    firsts = [1e3 * a["first_token_seconds"] for run in runs for a in run["answers"]]
    return {
        "first_token_ms": {
            "median": statistics.median(firsts), "p90": percentile(firsts, 0.9),
            "max": max(firsts), "count": len(firsts),
        },
        "tokens_per_s": spread([rate(run) for run in runs]),
    }  # fmt: skip


def measure(
    engines: dict[str, EngineProcess], conversations: list[list[dict]], args: Any, level: int
) -> dict[str, Any]:
    """All sides at one concurrency, in alternating order."""
    count = max(args.num_questions, 3 * level)
    requests = [(c, {}) for c in itertools.islice(itertools.cycle(conversations), count)]
    sampling = {"temperature": 0.0, "max_tokens": args.max_tokens}
    for engine in engines.values():
        short = sampling | {"max_tokens": WARM_UP_TOKENS}
        engine.run(requests[: max(2, level)], short, level, stream=True)
    runs: dict[str, list] = {name: [] for name in engines}
    for index in range(args.rounds):
        for name in list(engines)[:: 1 if index % 2 == 0 else -1]:
            runs[name].append(engines[name].run(requests, sampling, level, stream=True))
    found = {name: summarise(own) for name, own in runs.items()}
    base = next(iter(engines))
    pairs = {name: zip(own, runs[base], strict=True) for name, own in runs.items()}
    return {
        "num_questions": count,
        "sides": found,
        "rate_over_first_side": {
            name: spread([rate(run) / rate(other) for run, other in pair])
            for name, pair in pairs.items()
            if name != base
        },
    }


def rate(run: dict[str, Any]) -> float:
    """Output tokens per second of one round."""
    return sum(len(a["token_ids"]) for a in run["answers"]) / run["seconds"]


def main() -> None:
    """Start the engines, measure level by level."""
    args = parse_args()
    common = engine_arguments(args)
    if args.kv_cache_gb is not None:
        common["gpu_memory_utilization"] = 0.8 / len(args.sides)
    head = record_head(args, "latency") | {
        "sides": args.sides,
        "engine_args": {k: v for k, v in common.items() if k != "model"},
    }  # fmt: skip
    cells = Cells(args.out, head, args.time_limit)
    todo = [level for level in args.concurrency if {"concurrency": level} not in cells]
    questions = choose_prompts(read_prompts(args.questions).prompts, None)
    conversations = [[{"role": "user", "content": q.turns[0]}] for q in questions]
    speculative = {"speculative_config": {"method": "medusa", "model": args.heads}}
    made = {"stock": ({}, STOCK), "plugin off": ({}, {}), "medusa": (speculative, {})}
    engines: dict[str, EngineProcess] = {}
    try:
        for name in args.sides if todo else []:
            extra, environment = made[name]
            engines[name] = EngineProcess(name, common | extra, environment)
            engines[name].wait_ready()
        longest = 0.0
        for level in todo:
            if not cells.has_time(1.5 * longest):
                break
            began = time.monotonic()
            found = measure(engines, conversations, args, level)
            longest = max(longest, time.monotonic() - began)
            cells.add({"concurrency": level}, found)
            for name, side in found["sides"].items():
                first = side["first_token_ms"]
                print(
                    f"{level} at once, {name}: first token {first['median']:.1f} ms (p90 "
                    f"{first['p90']:.1f}), {side['tokens_per_s']['median']:.1f} tok/s",
                    flush=True,
                )
    finally:
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
