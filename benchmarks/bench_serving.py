"""Plain vLLM and Medusa on the same MT-Bench questions, taking turns in one run.

    python benchmarks/bench_serving.py --model MODEL --heads HEADS --out record.json

Per concurrency and round both sides answer the same questions (both turns, the
second with the side's own first answer), in alternating order, with that many requests
in flight all the time (a closed loop, load.py).  The record holds medians over rounds,
tokens per step with spread and by category, accepted tokens by depth, and where the two
sides' greedy answers part.  Every concurrency is written when it is measured, and skipped by
the next call with the same options.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from cells import add_options, add_sampling_options, sampling_filters
from contenders import add_side_option, further_sides
from engine_process import EngineProcess, benchmarks_on_path, num_slots
from load import CLOSED_LOOP, FINITE_BATCH, num_measured
from records import earlier_record, spread, write_record
from synthetic_profile import MOST_NODES, PAPER_TOKENS_PER_STEP, write_tree

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.training.prompt_files import Prompt, choose_prompts, read_prompts


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, max_tokens=256, rounds=3, concurrency=[1])
    parser.add_argument(
        "--num-questions",
        type=int,
        default=80,
        help="spread over categories; thrice the requests in flight if that is more",
    )
    parser.add_argument("--turns", type=int, default=2, choices=(1, 2))
    add_sampling_options(parser)
    parser.add_argument("--tree", default=None, help="tree of the Medusa side")
    parser.add_argument("--nodes", type=int, default=None, help="node budget of the Medusa side")
    parser.add_argument("--quantization", default=None, help="of both sides, as fp8 on line")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument(
        "--row-products",
        action="store_true",
        help="on a CPU: a third side, plain vLLM with the products that Medusa brings",
    )
    add_side_option(parser)
    parser.add_argument(
        "--synthetic-acceptance",
        type=float,
        default=None,
        metavar="TOKENS_PER_STEP",
        help="draw what is accepted, so that 63 nodes yield so many tokens a step (the paper's "
        f"Vicuna-7B Medusa-2: {PAPER_TOKENS_PER_STEP}); answers are of full length and no text",
    )
    args = parser.parse_args()
    if args.synthetic_acceptance is not None and (args.tree is not None or args.side):
        parser.error("--synthetic-acceptance brings its own tree; leave --tree and --side out")
    return args


def answer(
    side: EngineProcess,
    questions: list[Prompt],
    args: argparse.Namespace,
    concurrency: int,
    temperature: float,
    load: str = CLOSED_LOOP,
) -> dict[str, Any]:
    """All turns of all questions on one side; answers by question, then by turn."""
    sampling = {"temperature": temperature, "max_tokens": args.max_tokens}
    # vLLM itself drops these where the temperature is 0.
    sampling |= {name: value for name, value in sampling_filters(args).items() if value is not None}
    if getattr(args, "synthetic_acceptance", None) is not None:
        sampling["ignore_eos"] = True
    history: list[list[dict]] = [[] for _ in questions]
    result = {"seconds": 0.0, "seconds_with_tail": 0.0, "answers": [[] for _ in questions]}
    for turn in range(args.turns):
        for messages, question in zip(history, questions, strict=True):
            messages.append({"role": "user", "content": question.turns[turn]})
        own = {"seed": args.seed} if temperature > 0 else {}
        asked = [(messages, own) for messages in history]
        run = side.run(asked, sampling, concurrency, load=load)
        for clock in ("seconds", "seconds_with_tail"):
            result[clock] += run[clock]
        for messages, answers, output in zip(
            history, result["answers"], run["answers"], strict=True
        ):
            messages.append({"role": "assistant", "content": output["text"]})
            answers.append(output)
    return result


def tokens_per_step(histogram: list[int]) -> float:
    """1 + accepted tokens per verification step."""
    return 1 + sum(j * n for j, n in enumerate(histogram)) / max(1, sum(histogram))


def acceptance(questions: list[Prompt], run: dict[str, Any]) -> dict[str, Any]:
    """Tokens per step over all steps, per question and category, and acceptance by depth."""
    per_question, by_category, total = [], {}, [0] * 65
    for question, answers in zip(questions, run["answers"], strict=True):
        merged = [0] * 65
        for output in answers:
            for j, n in enumerate(output["accepted_histogram"]):
                merged[j] += n
                total[j] += n
        per_question.append(tokens_per_step(merged))
        by_category.setdefault(question.category, []).append(per_question[-1])
    steps = sum(total)
    depth = max((j for j, n in enumerate(total) if n), default=0)
    return {
        "tokens_per_step": tokens_per_step(total),
        "tokens_per_step_per_question": spread(per_question),
        "tokens_per_step_by_category": {
            name: statistics.mean(values) for name, values in sorted(by_category.items())
        },
        "accepted_by_depth": [sum(total[d:]) / max(1, steps) for d in range(1, depth + 1)],
        "verification_steps": steps,
    }


def agreement(plain: dict, medusa: dict, judge: EngineProcess) -> dict[str, Any]:
    """Where greedy answers part, and how near a tie the two tokens were there.

    bf16 logits of 16 to 32 lie 0.125 apart, and rows of different batch shapes are
    rounded differently; a gap of a few such steps at the first divergence is a tie
    that rounding broke, a large one would be a fault.
    """
    same, prompts, tokens = 0, [], []
    for left, right in zip(plain["answers"], medusa["answers"], strict=True):
        a, b = left[0]["token_ids"], right[0]["token_ids"]
        where = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if where is None:
            same += len(a) == len(b)
            continue
        prompts.append(left[0]["prompt_token_ids"] + a[:where])
        tokens.append((where, a[where], b[where]))
    gaps = []
    for (where, x, y), row in zip(
        tokens, judge.next_logprobs(prompts) if prompts else [], strict=True
    ):
        known = x in row and y in row
        gaps.append({"position": where, "logprob_gap": abs(row[x] - row[y]) if known else None})
    return {
        "first_turns_compared": len(plain["answers"]),
        "identical": same,
        "first_divergences": sorted(gaps, key=lambda gap: gap["position"]),
        "largest_gap": max(
            (g["logprob_gap"] for g in gaps if g["logprob_gap"] is not None), default=0
        ),
    }


def tokens_per_second(run: dict[str, Any], clock: str = "seconds") -> float:
    """Output tokens per second of one round, by one of the clocks of :func:`load.answer_all`."""
    return sum(len(o["token_ids"]) for a in run["answers"] for o in a) / run[clock]


def with_tail(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Tokens per second by the wall clock, lead-in and emptying included, and their ratios.

    Parameters
    ----------
    runs : dict
        Each side's rounds; the first side is what the others are compared with.
    """
    rates = {
        name: [tokens_per_second(run, "seconds_with_tail") for run in own]
        for name, own in runs.items()
    }
    base, *others = rates
    return {
        "tokens_per_s": {name: spread(own) for name, own in rates.items()},
        "speedup": {
            name: spread([m / p for m, p in zip(rates[name], rates[base], strict=True)])
            for name in others
        },
    }


def measure(
    sides: dict[str, EngineProcess],
    pool: list[Prompt],
    args: argparse.Namespace,
    level: int,
    temperature: float,
) -> dict[str, Any]:
    """One concurrency: a warm-up, then rounds with the sides' order alternating."""
    ordered = itertools.cycle(choose_prompts(pool, None))
    questions = list(itertools.islice(ordered, num_measured(args.num_questions, level)))
    runs: dict[str, list] = {name: [] for name in sides}
    for side in sides.values():
        answer(side, questions[: max(2, level)], args, level, temperature, FINITE_BATCH)
    for round_index in range(args.rounds):
        order = list(sides) if round_index % 2 == 0 else list(sides)[::-1]
        for name in order:
            runs[name].append(answer(sides[name], questions, args, level, temperature))
            rate = tokens_per_second(runs[name][-1])
            print(f"concurrency {level} round {round_index} {name}: {rate:.1f} tok/s", flush=True)
    rates = {name: [tokens_per_second(run) for run in own] for name, own in runs.items()}

    def ratio(name: str, base: str) -> dict[str, Any]:
        return spread([m / p for m, p in zip(rates[name], rates[base], strict=True)])

    row_products = {}
    if "row products" in rates:
        row_products = {
            "row_products_tokens_per_s": spread(rates["row products"]),
            "speedup_over_row_products": ratio("medusa", "row products"),
        }
    further = [name for name in sides if name not in ("plain", "medusa", "row products")]
    return {
        "concurrency": level,
        "temperature": temperature,
        "num_questions": len(questions),
        "plain_tokens_per_s": spread(rates["plain"]),
        "medusa_tokens_per_s": spread(rates["medusa"]),
        "speedup": ratio("medusa", "plain"),
        "with_tail": with_tail(runs),
        **row_products,
        "acceptance": acceptance(questions, runs["medusa"][-1]),
        "agreement": agreement(runs["plain"][-1], runs["medusa"][-1], sides["plain"])
        if temperature == 0 and args.synthetic_acceptance is None
        else None,
        "further_sides": {
            name: {
                "tokens_per_s": spread(rates[name]),
                "speedup": ratio(name, "plain"),
                "acceptance": acceptance(questions, runs[name][-1]),
            }
            for name in further
        },
    }


def synthetic_side(args: argparse.Namespace, speculative: dict, max_num_seqs: int) -> dict:
    """Engine arguments under which a side's drafts are accepted by chance."""
    nodes = args.nodes or MOST_NODES
    tree = args.out.with_suffix(".tree.json")
    heads = load_heads(args.heads).spec.num_heads
    write_tree(tree, args.synthetic_acceptance, heads, nodes)
    config = speculative | {"tree": str(tree), "adaptive": True, "num_speculative_tokens": nodes}
    side = {
        "speculative_config": config,
        "worker_extension_cls": "synthetic_acceptance.SyntheticAcceptance",
    }
    if not torch.cuda.is_available():
        # A CPU has no schedule of its own for a tree that is given; the largest batch is plain.
        config["num_speculative_tokens_per_batch_size"] = [[1, max_num_seqs, nodes]]
        side["max_num_seqs"] = max_num_seqs + 1
    return side


def document(args: argparse.Namespace, common: dict, speculative: dict) -> dict[str, Any]:
    """What all results of a record have in common."""
    settings = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("VLLM_", "OMP_")) and "CACHE" not in name
    }
    return {
        "benchmark": "serving",
        "load": CLOSED_LOOP,
        "engine_args": {k: v for k, v in common.items() if k != "model"},
        "speculative_config": {k: v for k, v in speculative.items() if k != "model"},
        "model": Path(args.model).name,
        "label": args.label or Path(args.model).name,
        "heads": Path(args.heads).name,
        "further_sides": args.side,
        "synthetic_acceptance": args.synthetic_acceptance,
        **sampling_filters(args),
        "turns": args.turns,
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "environment": settings,
    }


def main() -> None:
    """Start both engines, measure, write the record."""
    args, began = parse_args(), time.monotonic()
    pool = read_prompts(args.questions).prompts
    common: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "enforce_eager": args.enforce_eager,
        "max_model_len": args.max_model_len,
        "max_num_seqs": num_slots(args.max_num_seqs, args.concurrency),
        # Both turns share a prefix; reusing it would time the cache, not decoding.
        "enable_prefix_caching": False,
        "seed": args.seed,
        "per_request_spec_decode_metrics": "summary",
    }
    if args.kv_cache_gb is not None:
        common["kv_cache_memory_bytes"] = int(args.kv_cache_gb * 2**30)
        # Two engines share the GPU; vLLM refuses to start unless this share of it is free.
        common["gpu_memory_utilization"] = 0.8 / (2 + len(args.side))
    speculative: dict[str, Any] = {"method": "medusa", "model": args.heads}
    if args.tree is not None:
        speculative["tree"] = args.tree
    if args.nodes is not None:
        speculative["num_speculative_tokens"] = args.nodes
    plain = {"per_request_spec_decode_metrics": "none"}
    extras: dict[str, dict] = {"plain": plain, "medusa": {"speculative_config": speculative}}
    if args.synthetic_acceptance is not None:
        extras["medusa"] = synthetic_side(args, speculative, common["max_num_seqs"])
        speculative = extras["medusa"]["speculative_config"]
    extras |= further_sides(args.side, args.heads)
    if args.row_products:
        extras["row products"] = plain | {
            "worker_cls": "row_product_worker.RowProductWorker",
            # vLLM's compiled graphs are kept under a hash that leaves the worker out.
            "additional_config": {"products": "rows"},
        }
    head = document(args, common, speculative)
    old = earlier_record(args.out, head)
    results = [] if old is None else old["results"]
    done = {(result["temperature"], result["concurrency"]) for result in results}
    todo = [
        case for case in itertools.product(args.temperature, args.concurrency) if case not in done
    ]
    sides: dict[str, EngineProcess] = {}
    took = 0.0
    try:
        for name, extra in extras.items() if todo else ():
            sides[name] = EngineProcess(name, common | extra, benchmarks_on_path())
            if args.kv_cache_gb is None:
                # Each profiles free memory while it starts.
                sides[name].wait_ready()
        for side in sides.values():
            side.wait_ready()
        print(f"all engines ready after {time.monotonic() - began:.0f} s", flush=True)
        for temperature, level in todo:
            if time.monotonic() + 1.2 * took > began + args.time_limit:
                print(f"no time for concurrency {level}, T={temperature:g}", flush=True)
                continue
            since = time.monotonic()
            results.append(measure(sides, pool, args, level, temperature))
            took = max(took, time.monotonic() - since)
            write_record(args.out, head | {"results": results})
    finally:
        for side in sides.values():
            side.close()
    for result in results:
        print(
            f"T={result['temperature']:g}, concurrency {result['concurrency']}: plain "
            f"{result['plain_tokens_per_s']['median']:.1f} tok/s, medusa "
            f"{result['medusa_tokens_per_s']['median']:.1f} tok/s, speed-up "
            f"{result['speedup']['median']:.2f}, tokens per step "
            f"{result['acceptance']['tokens_per_step']:.2f}"
        )
        if (same := result["agreement"]) is not None:
            print(
                f"{same['identical']} of {same['first_turns_compared']} answers identical; where "
                f"others part log probabilities lie at most {same['largest_gap']:.3f} apart"
            )


if __name__ == "__main__":
    main()
