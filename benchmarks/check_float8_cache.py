"""Medusa over a float8 KV cache answers as plain vLLM does over the same cache (one GPU).

    python benchmarks/check_float8_cache.py --model MODEL --heads HEADS --out record.json

Three engines answer the same MT-Bench questions greedily: plain vLLM and Medusa with a float8
cache, plain vLLM with an unquantised one.  Where Medusa's answer parts from plain vLLM's, the
two tokens' log probabilities in plain vLLM tell a tie that rounding broke from a fault: both
sides round queries, keys and values alike, but FlashAttention also rounds the softmax's weights
to float8 and the tree kernel does not.  The unquantised side is the yardstick: how far the
cache's own rounding moves answers.  The exit status is 1 where a gap exceeds --most-gap.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench_serving import acceptance, agreement, answer
from cells import QUESTIONS
from engine_process import EngineProcess
from load import FINITE_BATCH
from records import write_record

from vllm_medusa.training.prompt_files import choose_prompts, read_prompts


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="target model directory")
    parser.add_argument("--heads", required=True, help="Medusa heads")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--kv-cache-dtype", default="fp8", choices=("fp8", "fp8_e4m3"))
    parser.add_argument("--num-questions", type=int, default=24, help="spread over categories")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kv-cache-gb", type=float, default=2.0, help="of each of three engines")
    parser.add_argument(
        "--most-gap", type=float, default=1.0, help="of log probabilities where answers part"
    )
    args = parser.parse_args()
    args.turns, args.seed = 1, 0
    return args


def compare(
    sides: dict[str, EngineProcess], questions: list, args: argparse.Namespace, level: int
) -> dict[str, Any]:
    """One concurrency: answers of all three sides, compared in pairs."""
    runs = {
        name: answer(side, questions, args, level, 0.0, FINITE_BATCH)
        for name, side in sides.items()
    }
    judge = sides["plain"]
    result = {
        "concurrency": level,
        "medusa_against_plain": agreement(runs["plain"], runs["medusa"], judge),
        "unquantised_against_plain": agreement(runs["plain"], runs["unquantised"], judge),
        "acceptance": acceptance(questions, runs["medusa"]),
    }
    for name in ("medusa", "unquantised"):
        found = result[f"{name}_against_plain"]
        print(
            f"concurrency {level}, {name} against plain: {found['identical']} of "
            f"{found['first_turns_compared']} answers identical, largest gap "
            f"{found['largest_gap']:.3f}",
            flush=True,
        )
    print(f"tokens per step {result['acceptance']['tokens_per_step']:.2f}", flush=True)
    return result


def is_explained(found: dict[str, Any], most_gap: float) -> bool:
    """Whether every divergence is a near tie."""
    gaps = [entry["logprob_gap"] for entry in found["first_divergences"]]
    return all(gap is not None and gap <= most_gap for gap in gaps)


def main() -> int:
    """Start the engines, compare, write the record."""
    args = parse_args()
    questions = choose_prompts(read_prompts(QUESTIONS).prompts, args.num_questions)
    common: dict[str, Any] = {
        "model": args.model,
        "max_model_len": 2048,
        "max_num_seqs": max(8, *args.concurrency),
        "enable_prefix_caching": False,
        "seed": 0,
        "kv_cache_memory_bytes": int(args.kv_cache_gb * 2**30),
        # Three engines share the GPU; vLLM refuses to start unless this share of it is free.
        "gpu_memory_utilization": 0.25,
    }
    plain = {"attention_backend": "FLASH_ATTN", "per_request_spec_decode_metrics": "none"}
    float8 = {"kv_cache_dtype": args.kv_cache_dtype}
    extras = {
        "plain": plain | float8,
        "unquantised": plain,
        "medusa": float8
        | {
            "speculative_config": {"method": "medusa", "model": args.heads},
            "per_request_spec_decode_metrics": "summary",
        },
    }
    sides: dict[str, EngineProcess] = {}
    try:
        for name, extra in extras.items():
            sides[name] = EngineProcess(name, common | extra)
        for side in sides.values():
            side.wait_ready()
        results = [compare(sides, questions, args, level) for level in args.concurrency]
    finally:
        for side in sides.values():
            side.close()
    write_record(
        args.out,
        {
            "benchmark": "float8_cache",
            "kv_cache_dtype": args.kv_cache_dtype,
            "model": Path(args.model).name,
            "heads": Path(args.heads).name,
            "num_questions": len(questions),
            "max_tokens": args.max_tokens,
            "most_gap": args.most_gap,
            "results": results,
        },
    )
    explained = [is_explained(r["medusa_against_plain"], args.most_gap) for r in results]
    return 0 if all(explained) else 1


if __name__ == "__main__":
    sys.exit(main())
