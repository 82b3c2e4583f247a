"""Where the GPU time of a decode step goes, with and without Medusa.

    python benchmarks/profile_step.py --model MODEL --heads HEADS --out record.json

Runs both engines one after the other in this process under torch's profiler, cuts the trace of
decode steps at the kernel that ends a step, and adds up kernel time by what it serves.  With
``--questions`` requests come and go, and steps with a prefill in them are summed up apart.
"""

from __future__ import annotations

import argparse
import collections
import gc
import itertools
import os
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

# One process, so that the profiler sees the worker.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from cells import QUESTIONS
from contenders import add_side_option, further_sides
from engine_process import token_ids
from load import answer_all
from records import spread, write_record

from vllm_medusa.training.prompt_files import read_prompts

# First match wins; the rest is "other" (norms, rotary embedding, activations, copies).
KINDS = (
    ("attention", r"tree_attention|tree_part|join_splits|flash|FlashAttn|reshape_and_cache"),
    ("draw", r"gumbel"),
    ("walk", r"tree_walk|scatter_tree"),
    ("KV move", r"kv_compaction|compact|move_rows"),
    ("draft", r"draft_tree|best_tree"),
    ("products", r"gemm|gemv|cutlass|nvjet|splitK|cublas|wgmma"),
)
# The last kernel of a step that is worth finding; between walk and draft lie move and heads.
STEP_END = {"medusa": r"draft_tree|best_tree", "plain": r"gumbel"}
# Steps that are longer than the shortest of their batch by so many launches hold a prefill.
MIXED_LAUNCHES = 12
PROMPT = "Write a long story about a lighthouse keeper who learns to cook."


class Kernel(NamedTuple):
    """One launch on the GPU: name, start and end in microseconds."""

    name: str
    start: float
    end: float


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--heads", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--label", default=None, help="how tables name the model")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument(
        "--questions", type=int, default=0, help="so many of MT-Bench instead of one long prompt"
    )
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--sides", nargs="*", choices=STEP_END, default=list(STEP_END))
    add_side_option(parser)
    return parser.parse_args()


def gpu_kernels(profile: torch.profiler.profile) -> list[Kernel]:
    """Kernels and copies of a trace in order of their start."""
    return sorted(
        (
            Kernel(event.name, event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ),
        key=lambda kernel: kernel.start,
    )


def cut_steps(kernels: list[Kernel], end: str) -> list[list[Kernel]]:
    """Kernels of each step; what comes before the first and after the last end is dropped."""
    steps, current = [], []
    for kernel in kernels:
        current.append(kernel)
        if re.search(end, kernel.name):
            steps.append(current)
            current = []
    return steps[1:]


def kind_of(name: str) -> str:
    """What a kernel serves."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def summarise(steps: list[list[Kernel]]) -> dict[str, Any]:
    """Median microseconds of pure decode steps and of steps with a prefill in them."""
    launches = sorted(len(step) for step in steps)
    # Not the very shortest: the batch may have been empty for a moment.
    usual = launches[len(launches) // 20]
    ends = [step[-1].end for step in steps]
    # A step's time is that since the end of the one before, idle time included.
    walls = [after - before for before, after in itertools.pairwise(ends)]
    found = {}
    for name, mixed in (("pure", False), ("mixed", True)):
        pairs = [
            (step, wall)
            for step, wall in zip(steps[1:], walls, strict=True)
            if (len(step) > usual + MIXED_LAUNCHES) == mixed
        ]
        if pairs:
            found[name] = sums([step for step, _ in pairs], [wall for _, wall in pairs])
    return found


def sums(steps: list[list[Kernel]], walls: list[float]) -> dict[str, Any]:
    """Median microseconds of steps, of their kinds of kernels and of their longest kernels."""
    by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0.0] * len(steps))
    by_name: dict[str, list[float]] = collections.defaultdict(lambda: [0.0] * len(steps))
    counts: collections.Counter[str] = collections.Counter()
    for index, step in enumerate(steps):
        walked = False
        for kernel in step:
            kind, time = kind_of(kernel.name), kernel.end - kernel.start
            walked = walked or "tree_walk" in kernel.name
            if walked and kind in ("products", "other"):
                kind = "heads"
            by_kind[kind][index] += time
            by_name[kernel.name[:120]][index] += time
            counts[kernel.name[:120]] += 1
    names = sorted(by_name, key=lambda name: -statistics.mean(by_name[name]))[:25]
    return {
        "steps": len(steps),
        "kernels_per_step": statistics.median(len(step) for step in steps),
        "step_us": spread(walls),
        "busy_us": spread([sum(k.end - k.start for k in step) for step in steps]),
        "by_kind_us": {k: round(statistics.median(v), 1) for k, v in sorted(by_kind.items())},
        "longest": [
            {
                "name": name,
                "us": round(statistics.mean(by_name[name]), 1),
                "launches": round(counts[name] / len(steps), 2),
            }
            for name in names
        ],
    }


def make_prompts(llm: Any, args: argparse.Namespace, concurrency: int) -> list[dict[str, Any]]:
    """One long prompt for every request, or so many questions."""
    tokenizer = llm.get_tokenizer()
    if args.questions:
        prompts = itertools.islice(itertools.cycle(read_prompts(QUESTIONS).prompts), args.questions)
        chats = [[{"role": "user", "content": prompt.turns[0]}] for prompt in prompts]
        return [{"prompt_token_ids": token_ids(tokenizer, chat)} for chat in chats]
    ids = tokenizer.encode(PROMPT)
    ids = (ids * (args.prompt_tokens // len(ids) + 1))[: args.prompt_tokens]
    return [{"prompt_token_ids": ids}] * concurrency


def profile_side(name: str, extra: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Start one engine, let it decode under the profiler at every concurrency, stop it."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(
        args.model, max_model_len=args.max_model_len, max_num_seqs=max(8, *args.concurrency),
        enable_prefix_caching=False, kv_cache_memory_bytes=4 << 30, gpu_memory_utilization=0.5,
        **extra,
    )  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=args.steps, ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    found = {}
    for concurrency in args.concurrency:
        prompts = make_prompts(llm, args, concurrency)
        asked = (llm.llm_engine, prompts, [params] * len(prompts), concurrency)
        answer_all(*asked)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            answer_all(*asked)
            torch.cuda.synchronize()
        steps = cut_steps(gpu_kernels(profile), STEP_END["medusa" if extra else "plain"])
        found[str(concurrency)] = summarise(steps)
        report(name, concurrency, found[str(concurrency)])
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return found


def report(name: str, concurrency: int, found: dict[str, Any]) -> None:
    """Print a side at one concurrency."""
    for kind, part in found.items():
        print(
            f"{name} x {concurrency}, {kind}: {part['steps']} steps of "
            f"{part['step_us']['median']:.0f} us, busy {part['busy_us']['median']:.0f} us, "
            f"{part['kernels_per_step']:.0f} kernels"
        )
        print("  " + ", ".join(f"{kind} {time:.0f}" for kind, time in part["by_kind_us"].items()))
        for entry in part["longest"][:14]:
            print(f"    {entry['us']:9.1f}  x{entry['launches']:<6} {entry['name'][:90]}")


def main() -> None:
    """Profile the sides, print and record."""
    args = parse_args()
    known = {"medusa": {"speculative_model": f"medusa:{args.heads}"}, "plain": {}}
    chosen = {name: known[name] for name in args.sides} | further_sides(args.side, args.heads)
    head = {
        "benchmark": "profile_step", "model": Path(args.model).name,
        "heads": Path(args.heads).name, "label": args.label or Path(args.model).name,
        "prompt_tokens": None if args.questions else args.prompt_tokens,
        "questions": args.questions, "tokens": args.steps,
    }  # fmt: skip
    sides: dict[str, Any] = {}
    for name, extra in chosen.items():
        sides[name] = profile_side(name, extra, args)
        write_record(args.out, head | {"sides": sides})


if __name__ == "__main__":
    main()
