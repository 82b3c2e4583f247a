"""Where the GPU time of a decode step goes, with and without Medusa.

    python benchmarks/profile_step.py --model MODEL --heads HEADS --out record.json

Runs both engines one after the other in this process under torch's profiler, cuts the trace of
decode steps at the kernel that ends a step, and adds up kernel time by what it serves.
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
from records import spread, write_record

# First match wins; the rest is "other" (norms, rotary embedding, activations, copies).
KINDS = (
    ("attention", r"tree_attention|tree_part|flash|FlashAttn|reshape_and_cache"),
    ("draw", r"gumbel"),
    ("walk", r"tree_walk|scatter_tree"),
    ("KV move", r"kv_compaction|compact|move_rows"),
    ("draft", r"draft_tree|best_tree"),
    ("products", r"gemm|gemv|cutlass|nvjet|splitK|cublas|wgmma"),
)
# The last kernel of a step that is worth finding; between walk and draft lie move and heads.
STEP_END = {"medusa": r"draft_tree|best_tree", "plain": r"gumbel"}
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
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--sides", nargs="+", choices=STEP_END, default=list(STEP_END))
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
    """Median microseconds of a step, of its kinds of kernels and of its longest kernels."""
    median = statistics.median(len(step) for step in steps)
    # Steps with a prefill or a first decode among them have other kernels.
    steps = [step for step in steps if abs(len(step) - median) <= 2] or steps
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
    wall = [after[-1].end - before[-1].end for before, after in itertools.pairwise(steps)]
    names = sorted(by_name, key=lambda name: -statistics.median(by_name[name]))[:25]
    return {
        "steps": len(steps),
        "kernels_per_step": median,
        "step_us": spread(wall),
        "busy_us": spread([sum(k.end - k.start for k in step) for step in steps]),
        "by_kind_us": {k: round(statistics.median(v), 1) for k, v in sorted(by_kind.items())},
        "longest": [
            {
                "name": name,
                "us": round(statistics.median(by_name[name]), 1),
                "launches": round(counts[name] / len(steps), 2),
            }
            for name in names
        ],
    }


def profile_side(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start one engine, let it decode under the profiler, stop it."""
    from vllm import LLM, SamplingParams

    extra = {"speculative_model": f"medusa:{args.heads}"} if name == "medusa" else {}
    llm = LLM(
        args.model, max_model_len=args.max_model_len, max_num_seqs=max(8, args.concurrency),
        enable_prefix_caching=False, kv_cache_memory_bytes=4 << 30, gpu_memory_utilization=0.5,
        **extra,
    )  # fmt: skip
    ids = llm.get_tokenizer().encode(PROMPT)
    ids = (ids * (args.prompt_tokens // len(ids) + 1))[: args.prompt_tokens]
    prompts = [{"prompt_token_ids": ids}] * args.concurrency
    params = SamplingParams(temperature=0.0, max_tokens=args.steps, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        llm.generate(prompts, params, use_tqdm=False)
        torch.cuda.synchronize()
    found = summarise(cut_steps(gpu_kernels(profile), STEP_END[name]))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return found


def main() -> None:
    """Profile the sides, print and record."""
    args = parse_args()
    sides = {name: profile_side(name, args) for name in args.sides}
    for name, found in sides.items():
        print(
            f"{name}: step {found['step_us']['median']:.0f} us, busy "
            f"{found['busy_us']['median']:.0f} us, {found['kernels_per_step']:.0f} kernels"
        )
        for kind, time in found["by_kind_us"].items():
            print(f"  {kind:<10} {time:9.1f}")
        for entry in found["longest"][:14]:
            print(f"    {entry['us']:9.1f}  x{entry['launches']:<6} {entry['name'][:90]}")
    write_record(
        args.out,
        {
            "benchmark": "profile_step",
            "model": Path(args.model).name,
            "heads": Path(args.heads).name,
            "concurrency": args.concurrency,
            "prompt_tokens": args.prompt_tokens,
            "steps": args.steps,
            "sides": sides,
        },
    )


if __name__ == "__main__":
    main()
