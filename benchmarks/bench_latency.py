"""Time to the first token, and what the plugin costs where it is off.

    python benchmarks/bench_latency.py --model MODEL --heads HEADS --out record.json

Three engines at once, taking turns: vLLM with the plugin absent (``VLLM_PLUGINS=''``), with the
plugin installed and off, and with Medusa. With ``--kv-cache-gb`` all start together, since starting
is most of the time (without it each profiles memory that nobody else may change). Every step's
tokens are handed out, as in a stream.  First tokens are timed with answers of a few
tokens, throughput with longer ones, of the first two engines only: Medusa's is bench_serving's.
Requests come in bursts of the concurrency, as finite batches (load.py): the two do not
speculate, so that a burst's answers end together and no slot runs empty.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

from cells import Cells, add_options, record_head
from compare import WARM_UP_TOKENS, engine_arguments
from contenders import STOCK
from engine_process import EngineProcess
from load import FINITE_BATCH
from records import spread

from vllm_medusa.training.prompt_files import choose_prompts, read_prompts

SIDES = ("stock", "plugin off", "medusa")
# Whose throughput is compared: neither speculates.
PLAIN_SIDES = SIDES[:2]


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, max_tokens=64, rounds=6, concurrency=[1, 8])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--num-questions", type=int, default=24, help="thrice the level if more")
    parser.add_argument("--first-tokens", type=int, default=4, help="of answers timed to the first")
    parser.add_argument(
        "--rate-questions",
        type=int,
        default=4,
        help="of answers timed as a whole; the level or more",
    )
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


def first_token_times(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """First-token times over all rounds, in milliseconds."""
    firsts = [1e3 * a["first_token_seconds"] for run in runs for a in run["answers"]]
    return {
        "median": statistics.median(firsts), "p90": percentile(firsts, 0.9),
        "max": max(firsts), "count": len(firsts),
    }  # fmt: skip


def in_turns(
    engines: dict[str, EngineProcess], requests: list, sampling: dict, level: int, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """All engines' runs, in alternating order."""
    runs: dict[str, list] = {name: [] for name in engines}
    for index in range(rounds):
        for name in list(engines)[:: 1 if index % 2 == 0 else -1]:
            runs[name].append(engines[name].run(requests, sampling, level, stream=True))
    return runs


def over_first(values: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Each side's values over the first side's of the same round.

    Examples
    --------
    >>> over_first({"a": [2.0, 4.0], "b": [3.0, 6.0]})["b"]["median"]
    1.5
    """
    base, *others = values
    return {
        name: spread([own / first for own, first in zip(values[name], values[base], strict=True)])
        for name in others
    }


def measure(
    engines: dict[str, EngineProcess], conversations: list[list[dict]], args: Any, level: int
) -> dict[str, Any]:
    """All sides at one concurrency."""
    count = max(args.num_questions, 3 * level)
    requests = [(c, {}) for c in itertools.islice(itertools.cycle(conversations), count)]
    plain = {name: engine for name, engine in engines.items() if name in PLAIN_SIDES}
    sampling = {"temperature": 0.0, "max_tokens": WARM_UP_TOKENS}
    for engine in engines.values():
        engine.run(requests[: max(2, level)], sampling, level, stream=True)
    short = sampling | {"max_tokens": args.first_tokens}
    firsts = in_turns(engines, requests, short, level, args.rounds)
    # Of one length, so that all requests end together and a round is decoding only.
    whole = sampling | {"max_tokens": args.max_tokens, "ignore_eos": True}
    few = requests[: max(args.rate_questions, level)]
    rates = {
        name: [rate(run) for run in runs]
        for name, runs in in_turns(plain, few, whole, level, args.rounds).items()
    }
    medians = {
        name: [first_token_times([run])["median"] for run in runs] for name, runs in firsts.items()
    }
    return {
        "num_questions": count,
        "sides": {
            name: {
                "first_token_ms": first_token_times(runs),
                "tokens_per_s": spread(rates[name]) if name in rates else None,
            }
            for name, runs in firsts.items()
        },
        "first_token_over_first_side": over_first(medians),
        "rate_over_first_side": over_first(rates) if rates else {},
    }


def start(args: argparse.Namespace, common: dict[str, Any]) -> dict[str, EngineProcess]:
    """All engines, ready; none is left where one fails."""
    speculative = {"speculative_config": {"method": "medusa", "model": args.heads}}
    made = {"stock": ({}, STOCK), "plugin off": ({}, {}), "medusa": (speculative, {})}
    engines: dict[str, EngineProcess] = {}
    try:
        for name in args.sides:
            extra, environment = made[name]
            engines[name] = EngineProcess(name, common | extra, environment)
            if args.kv_cache_gb is None:
                engines[name].wait_ready()
        for engine in engines.values() if args.kv_cache_gb is not None else ():
            engine.wait_ready()
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


def rate(run: dict[str, Any]) -> float:
    """Output tokens per second of one round."""
    return sum(len(a["token_ids"]) for a in run["answers"]) / run["seconds"]


def main() -> None:
    """Start the engines, measure level by level."""
    args = parse_args()
    common = engine_arguments(args)
    if args.kv_cache_gb is not None:
        common["gpu_memory_utilization"] = 0.8 / len(args.sides)
    head = record_head(args, "latency", FINITE_BATCH) | {
        "sides": args.sides,
        "first_tokens": args.first_tokens,
        "engine_args": {k: v for k, v in common.items() if k != "model"},
    }  # fmt: skip
    cells = Cells(args.out, head, args.time_limit)
    todo = [level for level in args.concurrency if {"concurrency": level} not in cells]
    if not todo:
        return
    questions = choose_prompts(read_prompts(args.questions).prompts, None)
    conversations = [[{"role": "user", "content": q.turns[0]}] for q in questions]
    began = time.monotonic()
    engines = start(args, common)
    print(f"all engines ready after {time.monotonic() - began:.0f} s", flush=True)
    try:
        longest = 0.0
        for level in todo:
            if not cells.has_time(1.5 * longest):
                break
            began = time.monotonic()
            found = measure(engines, conversations, args, level)
            longest = max(longest, time.monotonic() - began)
            cells.add({"concurrency": level}, found)
            print(f"{level} at once, {longest:.0f} s: {line(found)}", flush=True)
    finally:
        for engine in engines.values():
            engine.close()


def line(found: dict[str, Any]) -> str:
    """One cell in words."""
    told = []
    for name, side in found["sides"].items():
        first, speed = side["first_token_ms"], side["tokens_per_s"]
        text = f"{name}: first token {first['median']:.1f} ms (p90 {first['p90']:.1f})"
        if name in found["first_token_over_first_side"]:
            text += f", {found['first_token_over_first_side'][name]['median']:.3f} times"
        if speed is not None:
            text += f", {speed['median']:.1f} tok/s"
        if name in found["rate_over_first_side"]:
            over = found["rate_over_first_side"][name]
            error = over["stdev"] / over["count"] ** 0.5
            text += f", {over['mean']:.4f} +- {error:.4f} times"
        told.append(text)
    return "; ".join(told)


if __name__ == "__main__":
    main()
