"""Every way of speculation that vLLM 0.32 has, and ours, on the same questions: who wins where.

    python benchmarks/compare.py --model MODEL --heads HEADS --out record.json

Stock plain vLLM stays alive beside one contender after the other and takes turns with it, round
by round, so that every speed-up has a plain run next to it and a drift of the machine shows in
them. All see the same first turns of MT-Bench with so many requests in flight all the time (a
closed loop, load.py), greedily. Contenders that are no part of this project run with the plugin
off. Those that matter most come first, whatever the order in which they are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_serving import (
    acceptance,
    add_side_option,
    agreement,
    answer,
    further_sides,
    tokens_per_second,
    with_tail,
)
from cells import Cells, add_options, record_head
from engine_process import EngineError, EngineProcess, one_line
from load import CLOSED_LOOP, FINITE_BATCH, num_measured
from records import spread
from safetensors import safe_open

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.checkpoint_save import save_heads
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.training.prompt_files import Prompt, choose_prompts, read_prompts

# vLLM as it is without this project; the second hides our stand-in for Triton's CPU backend.
STOCK = {"VLLM_PLUGINS": "", "TRITON_BACKENDS_IN_TREE": "1"}
# vLLM's own Medusa and suffix decoding exist on its first runner only.
STOCK_V1 = STOCK | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
# The order of measuring; sides of --side come after the first.
SIDES = ("dynamic", "tree", "chain", "vllm-medusa", "ngram_gpu", "ngram", "suffix", "draft")
WARM_UP_TOKENS = 24


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, max_tokens=128, rounds=2, concurrency=[1, 8, 32])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
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


def heads_of(model: str, heads: str) -> HeadWeights:
    """Heads, checked against their target."""
    target = target_config(model)
    return load_heads(
        heads, hidden_size=target["hidden_size"], vocab_size=target["vocab_size"], base_model=model
    )


def target_config(model: str) -> dict[str, Any]:
    """``config.json`` of the target."""
    return json.loads((Path(model) / "config.json").read_text())


def heads_for_vllm(model: str, heads: str, folder: Path) -> Path:
    """Heads as vLLM's own loader reads them: with an lm_head in the file, one for all heads.

    Heads that share the target's lm_head are given a copy of it.
    """
    weights = heads_of(model, heads)
    if not weights.spec.own_lm_head:
        tied = target_config(model).get("tie_word_embeddings")
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        for path in sorted(Path(model).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118 (no mapping)
                    lm_head = file.get_tensor(name).to(weights.spec.dtype)
        spec = dataclasses.replace(weights.spec, own_lm_head=True, common_lm_head=True)
        weights = dataclasses.replace(weights, spec=spec, lm_head=lm_head[None])
    save_heads(weights, folder, "D")
    return folder


def contenders(args: argparse.Namespace) -> dict[str, tuple[Callable[[], dict], dict[str, str]]]:
    """Side -> (what makes its speculative_config, environment), in the order of measuring."""
    ours = {"method": "medusa", "model": args.heads}
    drafts = {"num_speculative_tokens": args.draft_tokens}
    lookup = drafts | {"prompt_lookup_max": 4, "prompt_lookup_min": 2}

    def num_heads() -> int:
        return heads_of(args.model, args.heads).spec.num_heads

    def chain() -> dict:
        return ours | {"tree": [1] * num_heads()}

    def stock_medusa() -> dict:
        copy = heads_for_vllm(args.model, args.heads, args.out.with_suffix(".heads"))
        return {
            "method": "medusa",
            "model": str(copy),
            "num_speculative_tokens": num_heads(),
        }

    def suffix() -> dict:
        if find_spec("arctic_inference") is None:
            raise RuntimeError("suffix decoding needs arctic-inference, which is not installed")
        return {"method": "suffix"}

    def draft() -> dict:
        if args.draft_model is None:
            raise RuntimeError("no --draft-model given")
        return drafts | {"method": "draft_model", "model": args.draft_model}

    known: dict[str, tuple[Callable[[], dict], dict[str, str]]] = {
        "tree": (lambda: ours | {"tree": "static"}, {}),
        "dynamic": (lambda: ours | {"tree": "dynamic"}, {}),
        "chain": (chain, {}),
        "vllm-medusa": (stock_medusa, STOCK_V1),
        "ngram": (lambda: lookup | {"method": "ngram"}, STOCK),
        "ngram_gpu": (lambda: lookup | {"method": "ngram_gpu"}, STOCK),
        "suffix": (suffix, STOCK_V1),
        "draft": (draft, STOCK),
    }
    chosen: dict[str, tuple[Callable[[], dict], dict[str, str]]] = {}
    for name, extra in further_sides(args.side, args.heads).items():
        config = extra["speculative_config"]
        own = config.get("method") == "medusa"
        chosen[name] = (functools.partial(dict, config), {} if own else STOCK)
    first, rest = SIDES[:1], SIDES[1:]
    return (
        {name: known[name] for name in first if name in args.sides}
        | chosen
        | {name: known[name] for name in rest if name in args.sides}
    )


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
    level: int,
) -> dict[str, Any]:
    """One contender beside plain decoding at one concurrency."""
    count = num_measured(args.num_questions, level)
    questions = list(itertools.islice(itertools.cycle(pool), count))
    both = {"plain": plain, "side": side}
    short = argparse.Namespace(**vars(args) | {"max_tokens": WARM_UP_TOKENS})
    for engine in both.values():
        answer(engine, questions[: max(2, level)], short, level, 0.0, FINITE_BATCH)
    runs: dict[str, list] = {name: [] for name in both}
    for index in range(args.rounds):
        for name in list(both)[:: 1 if index % 2 == 0 else -1]:
            runs[name].append(answer(both[name], questions, args, level, 0.0))
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
        "agreement": agreement(runs["plain"][-1], runs["side"][-1], plain),
    }


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What all engines have in common."""
    common: dict[str, Any] = {
        "model": args.model, "dtype": args.dtype, "enforce_eager": args.enforce_eager,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs or max(8, *args.concurrency),
        "enable_prefix_caching": False, "seed": args.seed,
    }  # fmt: skip
    if args.kv_cache_gb is not None:
        common["kv_cache_memory_bytes"] = int(args.kv_cache_gb * 2**30)
        # Two engines share the GPU; vLLM refuses to start unless this share of it is free.
        common["gpu_memory_utilization"] = 0.4
    return common


def run_side(
    name: str,
    levels: list[int],
    start: Callable[[], EngineProcess],
    plain: EngineProcess,
    pool: list[Prompt],
    args: argparse.Namespace,
    cells: Cells,
    took: dict[int, float],
) -> None:
    """All levels that are left of one contender; a failure is a cell too.

    ``took``: the longest that each level took so far, in seconds; kept up to date.
    """
    side, failure = None, {"side": name, "concurrency": None}
    try:
        side = start()
        side.wait_ready()
        for level in levels:
            if not cells.has_time(1.5 * took.get(level, 0.0)):
                print(f"{name}: no time for {level} request(s) at once", flush=True)
                continue
            began = time.monotonic()
            found = measure(plain, side, pool, args, level)
            took[level] = max(took.get(level, 0.0), time.monotonic() - began)
            cells.remove(failure)
            cells.add({"side": name, "concurrency": level}, found)
            print(f"{name}, {level} at once: {line(found)}", flush=True)
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


def left_to_do(
    cells: Cells, sides: list[str], levels: list[int], again: list[str]
) -> dict[str, list[int]]:
    """Levels to measure by contender; one that failed is left out unless it is to run again."""
    if unknown := set(again) - set(sides):
        raise ValueError(
            f"--again names {sorted(unknown)}, expected some of {sides}; add them to --sides"
        )
    return {
        name: [n for n in levels if name in again or {"side": name, "concurrency": n} not in cells]
        for name in sides
        if name in again or {"side": name, "concurrency": None} not in cells
    }


def line(cell: dict[str, Any]) -> str:
    """One cell in words."""
    same = cell["agreement"]
    parted = same["first_divergences"]
    where = f", the first to part at token {parted[0]['position']}" if parted else ""
    return (
        f"{cell['tokens_per_s']['median']:.1f} tok/s, {cell['speedup']['median']:.2f} times plain, "
        f"{cell['tokens_per_step']:.2f} tokens per step, {cell['step_ms']['median']:.2f} ms a step "
        f"(plain {cell['plain_step_ms']['median']:.2f}), {same['identical']} of "
        f"{same['first_turns_compared']} answers identical{where}"
    )


def winners(cells: list[dict[str, Any]]) -> list[str]:
    """Who is fastest at each concurrency, and who loses to plain decoding."""
    lines = []
    for level in sorted({c["key"]["concurrency"] for c in cells if "failed" not in c}):
        speeds = {
            c["key"]["side"]: c["speedup"]["median"]
            for c in cells
            if c["key"]["concurrency"] == level
        }
        ranked = sorted(speeds, key=lambda name: -speeds[name])
        ordered = ", ".join(f"{name} {speeds[name]:.2f}" for name in ranked)
        best = ranked[0] if speeds[ranked[0]] > 1 else "plain"
        lines.append(f"{level} at once: {best} wins ({ordered}; plain 1)")
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
    todo = left_to_do(cells, list(sides), args.concurrency, args.again)
    if any(todo.values()):
        began = time.monotonic()
        plain = EngineProcess("plain", common, STOCK)
        metrics = {"per_request_spec_decode_metrics": "summary"}

        def start(name: str) -> EngineProcess:
            config, environment = sides[name]
            extra = metrics | {"speculative_config": config()}
            return EngineProcess(name, common | extra, environment)

        took: dict[int, float] = {}
        try:
            plain.wait_ready()
            needed = time.monotonic() - began
            for name, levels in todo.items():
                if levels and not cells.has_time(1.5 * needed):
                    print(f"{name}: no time to start it", flush=True)
                elif levels:
                    starter = functools.partial(start, name)
                    run_side(name, levels, starter, plain, pool, args, cells, took)
        finally:
            plain.close()
    print("\n".join(winners(cells.cells)))


if __name__ == "__main__":
    main()
