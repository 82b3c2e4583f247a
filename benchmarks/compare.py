"""Every way of speculation that vLLM 0.32 has, and ours, on the same questions: who wins where.

    python benchmarks/compare.py --model MODEL --heads HEADS --out record.json

Stock plain vLLM stays alive beside one contender after the other and takes turns with it, round
by round, so that every speed-up has a plain run next to it and a drift of the machine shows in
them. All see the same first turns of MT-Bench with so many requests in flight all the time (a
closed loop, load.py), at every temperature. Contenders that are no part of this project run with
the plugin off. Those that matter most come first, whatever the order in which they are named.
With ``--kv-cache-gb`` plain vLLM and the first contender start together, since starting takes
about a minute (without it each profiles memory that nobody else may change).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_serving import (
    acceptance,
    agreement,
    answer,
    tokens_per_second,
    with_tail,
)
from cases import Case, case_of
from cells import Cells, add_options, add_sampling_options, record_head
from contenders import SIDES, STOCK, add_side_option, contenders
from engine_process import EngineError, EngineProcess, num_slots, one_line
from load import CLOSED_LOOP, FINITE_BATCH, num_measured
from records import spread

from vllm_medusa.training.prompt_files import Prompt, choose_prompts, read_prompts

WARM_UP_TOKENS = 24
# A case may take so much longer than the longest before it.
TIME_MARGIN = 1.2


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, max_tokens=128, rounds=2, concurrency=[1, 8, 32])
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    add_sampling_options(parser)
    add_side_option(parser)
    parser.add_argument(
        "--again",
        nargs="+",
        default=[],
        metavar="SIDE",
        help="measure these contenders although the record has them; a new cell replaces its old",
    )
    parser.add_argument("--draft-model", default=None, help="for the side `draft`")
    parser.add_argument("--draft-tokens", type=int, default=5, help="of ngram and draft sides")
    parser.add_argument("--num-questions", type=int, default=16, help="thrice the level if more")
    parser.add_argument("--max-model-len", type=int, default=2048)
    return parser.parse_args()


def steps_of(run: dict[str, Any]) -> dict[str, float]:
    """Tokens per step and mean step time of one round, of any kind of speculation.

    A request's steps are its tokens without the accepted drafts, its prefill among them; the time
    of a step is what requests took for theirs.
    """
    answers = [output for turns in run["answers"] for output in turns]
    tokens = sum(len(output["token_ids"]) for output in answers)
    accepted = sum(
        depth * count
        for output in answers
        for depth, count in enumerate(output["accepted_histogram"] or [])
    )
    # The last step may have accepted more than an answer had room for.
    steps = max(len(answers), tokens - accepted)
    seconds = sum(output["seconds"] for output in answers)
    return {"tokens_per_step": tokens / steps, "step_ms": 1e3 * seconds / steps}


def measure(
    plain: EngineProcess,
    side: EngineProcess,
    pool: list[Prompt],
    args: argparse.Namespace,
    case: Case,
) -> dict[str, Any]:
    """One contender beside plain decoding in one case."""
    level, heat = case
    count = num_measured(args.num_questions, level)
    questions = list(itertools.islice(itertools.cycle(pool), count))
    both = {"plain": plain, "side": side}
    short = argparse.Namespace(**vars(args) | {"max_tokens": WARM_UP_TOKENS})
    answer(plain, questions[: max(2, level)], short, level, heat, FINITE_BATCH)
    # Long enough for what a contender learns while it serves: Medusa's nodes of a step.
    answer(side, questions[: max(4, 2 * level)], args, level, heat, FINITE_BATCH)
    runs: dict[str, list] = {name: [] for name in both}
    for index in range(args.rounds):
        for name in list(both)[:: 1 if index % 2 == 0 else -1]:
            runs[name].append(answer(both[name], questions, args, level, heat))
    rates = {name: [tokens_per_second(run) for run in own] for name, own in runs.items()}
    steps = {name: [steps_of(run) for run in own] for name, own in runs.items()}
    has_counts = all(
        output["accepted_histogram"] for turns in runs["side"][-1]["answers"] for output in turns
    )
    found = acceptance(questions, runs["side"][-1]) if has_counts else {}
    return {
        "num_questions": count,
        "plain_tokens_per_s": spread(rates["plain"]),
        "tokens_per_s": spread(rates["side"]),
        "speedup": spread([m / p for m, p in zip(rates["side"], rates["plain"], strict=True)]),
        "with_tail": with_tail(runs),
        "tokens_per_step": statistics.median(s["tokens_per_step"] for s in steps["side"]),
        "step_ms": spread([s["step_ms"] for s in steps["side"]]),
        "plain_step_ms": spread([s["step_ms"] for s in steps["plain"]]),
        "accepted_by_depth": found.get("accepted_by_depth"),
        "agreement": agreement(runs["plain"][-1], runs["side"][-1], plain) if heat == 0 else None,
    }


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What all engines have in common."""
    common: dict[str, Any] = {
        "model": args.model, "dtype": args.dtype, "enforce_eager": args.enforce_eager,
        "max_model_len": args.max_model_len,
        "max_num_seqs": num_slots(args.max_num_seqs, args.concurrency),
        "enable_prefix_caching": False, "seed": args.seed,
    }  # fmt: skip
    if args.kv_cache_gb is not None:
        common["kv_cache_memory_bytes"] = int(args.kv_cache_gb * 2**30)
        # Two engines share the GPU; vLLM refuses to start unless this share of it is free.
        common["gpu_memory_utilization"] = 0.4
    return common


def run_side(
    name: str,
    cases: list[Case],
    start: Callable[[], EngineProcess],
    plain: EngineProcess,
    pool: list[Prompt],
    args: argparse.Namespace,
    cells: Cells,
    took: dict[int | None, float],
) -> None:
    """All cases that are left of one contender; a failure is a cell too.

    ``took``: the longest that each concurrency took so far, in seconds, and under None the longest
    start; kept up to date.
    """
    side, failure = None, {"side": name, "concurrency": None}
    try:
        with timed(took, None):
            side = start()
            for engine in (plain, side):
                engine.wait_ready()
        print(f"{name}: a start takes {took[None]:.0f} s at most", flush=True)
        for case in cases:
            # One that was not measured yet is taken to last as long as the longest one.
            longest = max((time for level, time in took.items() if level is not None), default=0.0)
            if not cells.has_time(TIME_MARGIN * took.get(case.concurrency, longest)):
                print(f"{name}: no time for {case}", flush=True)
                continue
            with timed(took, case.concurrency):
                found = measure(plain, side, pool, args, case)
            cells.remove(failure)
            cells.add(case.key(name), found)
            took_s = took[case.concurrency]
            print(f"{name}, {case}, {took_s:.0f} s at most: {line(found)}", flush=True)
    # Whatever it is that a contender lacks: the others go on.
    except Exception as error:
        is_engine = isinstance(error, EngineError)
        if is_engine and error.name == plain.name:
            raise
        reason = error.reason if is_engine else one_line(error)
        traceback.print_exc()
        cells.add(failure, {"failed": reason})
        print(f"{name}: {reason}", flush=True)
    finally:
        if side is not None:
            side.close()


@contextlib.contextmanager
def timed(took: dict[int | None, float], what: int | None) -> Iterator[None]:
    """Note how long the block takes, if it is the longest of its kind."""
    began = time.monotonic()
    yield
    took[what] = max(took.get(what, 0.0), time.monotonic() - began)


def left_to_do(
    cells: Cells, sides: list[str], cases: list[Case], again: list[str]
) -> dict[str, list[Case]]:
    """Cases to measure by contender; one that failed is left out unless it is to run again."""
    if unknown := set(again) - set(sides):
        raise ValueError(
            f"--again names {sorted(unknown)}, expected some of {sides}; add them to --sides"
        )
    return {
        name: [case for case in cases if name in again or case.key(name) not in cells]
        for name in sides
        if name in again or {"side": name, "concurrency": None} not in cells
    }


def line(cell: dict[str, Any]) -> str:
    """One cell in words."""
    text = (
        f"{cell['tokens_per_s']['median']:.1f} tok/s, {cell['speedup']['median']:.2f} times plain, "
        f"{cell['tokens_per_step']:.2f} tokens per step, {cell['step_ms']['median']:.2f} ms a step "
        f"(plain {cell['plain_step_ms']['median']:.2f})"
    )
    if (same := cell["agreement"]) is None:
        return text
    parted = same["first_divergences"]
    where = f", the first to part at token {parted[0]['position']}" if parted else ""
    return f"{text}, {same['identical']} of {same['first_turns_compared']} answers identical{where}"


def winners(cells: list[dict[str, Any]]) -> list[str]:
    """Who is fastest in each case, and who loses to plain decoding."""
    lines = []
    for case in sorted({case_of(c) for c in cells if "failed" not in c}):
        speeds = {c["key"]["side"]: c["speedup"]["median"] for c in cells if case_of(c) == case}
        ranked = sorted(speeds, key=lambda name: -speeds[name])
        ordered = ", ".join(f"{name} {speeds[name]:.2f}" for name in ranked)
        best = ranked[0] if speeds[ranked[0]] > 1 else "plain"
        lines.append(f"{case}: {best} wins ({ordered}; plain 1)")
    return lines


def main() -> None:
    """Start plain vLLM, then one contender after the other; write every cell at once."""
    args = parse_args()
    common = engine_arguments(args)
    head = record_head(args, "compare", CLOSED_LOOP) | {
        "draft_tokens": args.draft_tokens,
        "draft_model": args.draft_model and Path(args.draft_model).name,
        "engine_args": {k: v for k, v in common.items() if k != "model"},
        "order": "contenders one after the other, each taking turns with one stock plain engine "
        "that stays alive in the same GPU's memory",
    }  # fmt: skip
    cells = Cells(args.out, head, args.time_limit)
    pool = choose_prompts(read_prompts(args.questions).prompts, None)
    args.turns = 1
    sides = contenders(args)
    cases = [Case(n, heat) for heat in args.temperature for n in args.concurrency]
    todo = left_to_do(cells, list(sides), cases, args.again)
    if any(todo.values()):
        plain = EngineProcess("plain", common, STOCK)
        metrics = {"per_request_spec_decode_metrics": "summary"}

        def start(name: str) -> EngineProcess:
            config, environment = sides[name]
            extra = metrics | {"speculative_config": config()}
            return EngineProcess(name, common | extra, environment)

        took: dict[int | None, float] = {}
        try:
            if args.kv_cache_gb is None:
                plain.wait_ready()
            for name, left in todo.items():
                if left and not cells.has_time(TIME_MARGIN * took.get(None, 0.0)):
                    print(f"{name}: no time to start it", flush=True)
                elif left:
                    starter = functools.partial(start, name)
                    run_side(name, left, starter, plain, pool, args, cells, took)
        finally:
            plain.close()
    print("\n".join(winners(cells.cells)))


if __name__ == "__main__":
    main()
