"""The adaptive choice of nodes against every fixed tree, by concurrency and context.

    python benchmarks/bench_widths.py --model MODEL --heads HEADS --out record.json

One engine with ``adaptive`` on; per cell it is held at each width for one short round, and the best
of them then take turns with its own choice, so that all are measured with the same graphs,
interleaved.  What the choice expected of every width is in the record.

Prompts of a length are different MT-Bench questions with the model's own answers, in
an order of their own, and a last question; the prefix cache keeps them, so that rounds after the
first are decoding only.  Rounds are closed loops (load.py) over the prompts, which come again where
a loop needs more.  Cells of few tokens in the cache come first: a time limit leaves the most of
them.  ``--roofline FILE`` writes roofline.py's record too, from the same engine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

from bench_serving import tokens_per_second
from cells import Cells, add_options, record_head
from compare import steps_of
from contenders import target_config
from engine_process import EngineProcess, benchmarks_on_path, num_slots
from load import CLOSED_LOOP, num_measured
from records import spread, write_record
from roofline import step_record

from vllm_medusa.training.prompt_files import choose_prompts, read_prompts

ADAPTIVE = "adaptive"
# Above, batches of equal trees have no graph of their own and no step was timed (step_timer.py).
MOST_ROWS = 512
# Of an answer in the rounds that only rank the widths, and teach what each accepts.
SCOUT_TOKENS = 48


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    levels = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    add_options(parser, max_tokens=96, rounds=2, concurrency=levels)
    parser.add_argument("--nodes", type=int, nargs="+", default=[0, 3, 7, 15, 31, 63])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument(
        "--requests", type=int, default=4, help="prompts of a cell; the level if more"
    )
    parser.add_argument(
        "--finalists", type=int, default=2, help="fixed widths that all rounds are for"
    )
    parser.add_argument("--num-questions", type=int, default=80, help="whose answers fill prompts")
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--config", type=json.loads, default={}, help="more of speculative_config")
    parser.add_argument("--roofline", type=Path, default=None, help="JSON record of steps to write")
    return parser.parse_args()


def fill_prompts(
    blocks: list[list[int]], last: list[list[int]], length: int, count: int, seed: int
) -> list[list[int]]:
    """Token-id prompts of exactly ``length``: shuffled blocks, the last one cut, and a question.

    Parameters
    ----------
    blocks : list of list of int
        Questions with their answers, in the model's chat format.
    last : list of list of int
        Questions to answer.

    Examples
    --------
    >>> fill_prompts([[1, 2], [3, 4]], [[8], [9]], 4, 2, seed=1)
    [[1, 2, 3, 8], [3, 4, 1, 9]]
    """
    draw, prompts = random.Random(seed), []
    for index in range(count):
        question = last[index % len(last)]
        order, body = draw.sample(blocks, len(blocks)), []
        for block in order * (1 + length // sum(map(len, blocks))):
            if len(body) + len(question) >= length:
                break
            body = body + block
        room = max(0, length - len(question))
        prompts.append(body[:room] + question)
    return prompts


def make_blocks(engine: EngineProcess, args: argparse.Namespace) -> tuple[list, list]:
    """The model's own first answers as prompt blocks, and the questions as they are asked."""
    pool = choose_prompts(read_prompts(args.questions).prompts, args.num_questions)
    requests = [([{"role": "user", "content": q.turns[0]}], {}) for q in pool]
    sampling = {"temperature": 0.0, "max_tokens": args.answer_tokens}
    level = num_slots(args.max_num_seqs, args.concurrency)
    answers = engine.run(requests, sampling, min(64, level))["answers"]
    blocks = [a["prompt_token_ids"] + a["token_ids"] for a in answers]
    return blocks, [a["prompt_token_ids"] for a in answers]


def held_at(
    engine: EngineProcess, width: Any, requests: list, sampling: dict, level: int
) -> dict[str, Any]:
    """A closed loop at a width; of the adaptive choice also what it came to."""
    engine.call_workers("force_nodes", None if width == ADAPTIVE else width)
    run = engine.run(requests, sampling, level, load=CLOSED_LOOP)
    # As bench_serving counts: answers by question, then by turn.
    run["answers"] = [[answer] for answer in run["answers"]]
    if width == ADAPTIVE:
        (state,) = engine.call_workers("force_nodes", None)
        sizes = state["nodes_by_batch_size"]
        (expected,) = engine.call_workers("expected_steps", level)
        run["chosen"] = {
            "nodes": sizes[min(level, len(sizes)) - 1], "share": state["share"],
            "expected": expected,
        }  # fmt: skip
    return run


def measure(
    engine: EngineProcess, prompts: list[list[int]], args: argparse.Namespace, level: int
) -> dict[str, Any]:
    """All widths that have graphs once, then the best of them and the adaptive choice in turns."""
    sampling = {"temperature": 0.0, "max_tokens": args.max_tokens}
    once = [(prompt, {}) for prompt in prompts]
    measured = list(itertools.islice(itertools.cycle(once), num_measured(len(once), level)))
    fixed = [n for n in args.nodes if (n + 1) * level <= MOST_ROWS]
    # Prefill for all rounds; then time for the adaptive choice to learn what is accepted, and for
    # whatever a batch of this kind needs for the first time.
    engine.call_workers("force_nodes", None)
    engine.run(once, sampling, level)
    held_at(engine, ADAPTIVE, once, sampling, level)
    short = sampling | {"max_tokens": min(SCOUT_TOKENS, args.max_tokens)}
    scouts = {width: [held_at(engine, width, once, short, level)] for width in fixed}
    ranked = sorted(fixed, key=lambda width: -tokens_per_second(scouts[width][0]))
    widths = [ADAPTIVE, *ranked[: args.finalists]]
    runs: dict[Any, list] = {width: [] for width in widths}
    for index in range(args.rounds):
        for width in widths[:: 1 if index % 2 == 0 else -1]:
            runs[width].append(held_at(engine, width, measured, sampling, level))
    found = {}
    for width, own in (scouts | runs).items():
        steps = [steps_of(run) for run in own]
        found[str(width)] = {
            "tokens_per_s": spread([tokens_per_second(run) for run in own]),
            "tokens_per_step": spread([s["tokens_per_step"] for s in steps]),
            "step_ms": spread([s["step_ms"] for s in steps]),
        }
    finals = {width: found[str(width)]["tokens_per_s"]["median"] for width in widths}
    best = max(widths[1:], key=lambda width: finals[width])
    return {
        "prompts": len(prompts),
        "requests": len(measured),
        "widths": found,
        "chosen": [run["chosen"] for run in runs[ADAPTIVE]],
        "best_fixed": best,
        "adaptive_over_best_fixed": finals[ADAPTIVE] / finals[best],
    }


def start(args: argparse.Namespace) -> EngineProcess:
    """The engine; its longest prompt and answer fit."""
    # Async scheduling counts the rows of two steps before it knows what they accepted; behind that
    # the last trees of an answer would be cut.
    longest = max(args.context) + args.max_tokens + 2 * (max(args.nodes) + 1)
    arguments: dict[str, Any] = {
        "model": args.model, "dtype": args.dtype, "enforce_eager": args.enforce_eager,
        "max_model_len": longest, "seed": args.seed, "enable_prefix_caching": True,
        "max_num_seqs": num_slots(args.max_num_seqs, args.concurrency),
        "per_request_spec_decode_metrics": "summary",
        "worker_extension_cls": "forced_nodes.ForcedNodes",
        "speculative_config": {"method": "medusa", "model": args.heads} | args.config,
    }  # fmt: skip
    if args.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(args.kv_cache_gb * 2**30)
    if longest > target_config(args.model)["max_position_embeddings"]:
        # Beyond the positions that it was trained on a model's text is worse; the steps cost the
        # same. Without room for them its rotary table would be read behind its end.
        arguments["hf_overrides"] = {"max_position_embeddings": longest}
    return EngineProcess("adaptive", arguments, benchmarks_on_path())


def main() -> None:
    """Start the engine, measure cell by cell."""
    args, began = parse_args(), time.monotonic()
    head = record_head(args, "widths", CLOSED_LOOP)
    head |= {"nodes": args.nodes, "finalists": args.finalists, "config": args.config}
    cells = Cells(args.out, head, args.time_limit)
    pairs = sorted(itertools.product(args.concurrency, args.context), key=math.prod)
    keys = [{"concurrency": n, "context": c} for n, c in pairs]
    todo = [key for key in keys if key not in cells]
    if not todo:
        return
    engine = start(args)
    try:
        engine.wait_ready()
        print(f"engine ready after {time.monotonic() - began:.0f} s", flush=True)
        if args.roofline is not None:
            (sizes,) = engine.call_workers("measure_model")
            write_record(args.roofline, step_record(sizes, args))
        room = engine.cache_tokens()
        blocks, last = make_blocks(engine, args)
        took = 0.0
        for key in todo:
            level, context = key["concurrency"], key["context"]
            count = max(args.requests, level)
            if room is not None and count * (context + args.max_tokens + 64) > room:
                print(f"{key}: more than the cache's {room} tokens, left out", flush=True)
                continue
            if not cells.has_time(1.2 * took):
                break
            since = time.monotonic()
            prompts = fill_prompts(blocks, last, context, count, args.seed)
            found = measure(engine, prompts, args, level)
            took = max(took, time.monotonic() - since)
            cells.add(key, found)
            print(
                f"{key}: adaptive {found['widths'][ADAPTIVE]['tokens_per_s']['median']:.1f} tok/s "
                f"(chose {[c['nodes'] for c in found['chosen']]}), best fixed {found['best_fixed']}"
                f" nodes, adaptive {found['adaptive_over_best_fixed']:.3f} times it, "
                f"{took:.0f} s at most",
                flush=True,
            )
    finally:
        engine.close()


if __name__ == "__main__":
    main()
