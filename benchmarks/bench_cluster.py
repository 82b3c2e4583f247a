"""Tensor and pipeline parallelism over the GPUs of one host, with and without Medusa.

    python benchmarks/bench_cluster.py --model MODEL --heads HEADS --out record.json

For every parallelism (one GPU, two as tensor parallel, two as pipeline stages) a plain and a
Medusa engine answer the same greedy questions one after the other; a local Ray cluster runs
their workers (``--executor mp``: without Ray).  An engine that the record holds already is
not run again, so a run that was stopped goes on where it was.  The record holds tokens/s,
step time, which answers equal those of one GPU, the heads' memory by rank, and the share of
collectives in a decode step's GPU time: kernels of NCCL and of vLLM's own all-reduce in a
torch profile of rank 0, which includes their waiting for the other rank.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_process import EngineProcess
from load import FINITE_BATCH
from records import spread, write_record

from vllm_medusa.training.prompt_files import choose_prompts, read_prompts

QUESTIONS = Path(__file__).parent / "data" / "mt_bench_questions.jsonl"
PARALLEL = {
    "tp1": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
}
SIDES = ("plain", "medusa")
# vLLM's own all-reduce kernels are called cross_device_reduce_*.
COLLECTIVE = re.compile(r"nccl|cross_device_reduce|all_?reduce|all_?gather", re.IGNORECASE)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="target model directory")
    parser.add_argument("--heads", required=True, help="Medusa heads")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write or complete")
    parser.add_argument("--parallel", nargs="+", choices=PARALLEL, default=list(PARALLEL))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--executor", choices=("ray", "mp"), default="ray")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-questions", type=int, default=16, help="at least; 2 per slot")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--nodes", type=int, default=None, help="node budget of the Medusa side")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--kv-cache-gb", type=float, default=None)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--no-profile", action="store_true", help="no share of collectives")
    parser.add_argument("--time-limit", type=float, default=None, metavar="S",
                        help="start no further engine after so many seconds")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="show the engines, start none")
    return parser.parse_args(argv)


def engine_arguments(args: argparse.Namespace, parallel: str, side: str) -> dict[str, Any]:
    """``LLM`` arguments of one engine."""
    arguments: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": max(8, *args.concurrency),
        # Questions come again in every round; reusing their prefixes would time the cache.
        "enable_prefix_caching": False,
        "enforce_eager": args.enforce_eager,
        "distributed_executor_backend": args.executor,
        **PARALLEL[parallel],
    }
    if args.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(args.kv_cache_gb * 2**30)
    if side == "medusa":
        speculative: dict[str, Any] = {"method": "medusa", "model": args.heads}
        # One worker alone would choose its trees, and comparing would mean nothing.
        speculative["tree"] = "static"
        if args.nodes is not None:
            speculative["num_speculative_tokens"] = args.nodes
        arguments["speculative_config"] = speculative
        arguments["per_request_spec_decode_metrics"] = "summary"
    return arguments


@contextlib.contextmanager
def ray_cluster(executor: str, num_gpus: int) -> Iterator[None]:
    """A Ray cluster of this host alone, for as long as the block runs."""
    if executor != "ray" or os.environ.get("RAY_ADDRESS"):
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    port = 6390
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}"]
    command += [f"--num-gpus={num_gpus}", "--node-ip-address=127.0.0.1"]
    # Nothing but control messages passes the object store.
    command += [f"--object-store-memory={2**30}", "--include-dashboard=false"]
    command += ["--disable-usage-stats", "--block"]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        time.sleep(15)
        if head.poll() is not None:
            raise RuntimeError(f"ray start ended with code {head.returncode}; try --executor mp")
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        head.terminate()
        head.wait(60)


def collective_share(folder: Path) -> dict[str, float] | None:
    """Kernel time of collectives in the newest trace of rank 0; None where it has no kernels."""
    traces = sorted(folder.glob("*rank0*trace.json*"), key=lambda path: path.stat().st_mtime)
    traces = traces or sorted(folder.glob("*trace.json*"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return None
    opened = gzip.open if traces[-1].suffix == ".gz" else open
    with opened(traces[-1], "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    total = sum(event["dur"] for event in kernels)
    if not total:
        return None
    shared = sum(event["dur"] for event in kernels if COLLECTIVE.search(event["name"]))
    return {"share": shared / total, "collective_us": shared, "all_kernels_us": total}


def summarise(runs: list[dict[str, Any]], level: int) -> dict[str, Any]:
    """Rates and step times of rounds that answered the same questions."""
    rates, step_ms, per_step = [], [], []
    for run in runs:
        tokens = [len(answer["token_ids"]) for answer in run["answers"]]
        histograms = [answer["accepted_histogram"] for answer in run["answers"]]
        # A request takes a step for its first token, and one for each tree.
        steps = [t if h is None else 1 + sum(h) for t, h in zip(tokens, histograms, strict=True)]
        rates.append(sum(tokens) / run["seconds"])
        step_ms.append(1e3 * run["seconds"] * min(level, len(steps)) / sum(steps))
        per_step.append(sum(tokens) / sum(steps))
    return {
        "concurrency": level,
        "tokens_per_s": spread(rates),
        "step_ms": spread(step_ms),
        "tokens_per_step": spread(per_step),
    }


def measure(args: argparse.Namespace, parallel: str, side: str) -> tuple[dict, dict]:
    """One engine at all concurrencies: its results, and its answers for comparison."""
    pool = choose_prompts(read_prompts(QUESTIONS).prompts, None)
    sampling = {"temperature": 0.0, "max_tokens": args.max_tokens}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as traces:
        arguments = engine_arguments(args, parallel, side)
        if not args.no_profile:
            arguments["profile_to"] = traces
        engine = EngineProcess(f"{parallel} {side}", arguments)
        try:
            engine.wait_ready()
            started = time.monotonic() - began
            results, answers = [], {}
            for level in args.concurrency:
                count = max(args.num_questions, 2 * level)
                asked = [pool[i % len(pool)] for i in range(count)]
                chats = [([{"role": "user", "content": q.turns[0]}], {}) for q in asked]
                engine.run(chats[:level], sampling | {"max_tokens": 16}, level)
                runs = [engine.run(chats, sampling, level) for _ in range(args.rounds)]
                answers[str(level)] = [answer["token_ids"] for answer in runs[0]["answers"]]
                results.append(summarise(runs, level))
                print(f"{parallel} {side} at {level}: "
                      f"{results[-1]['tokens_per_s']['median']:.1f} tok/s", flush=True)  # fmt: skip
            heads = engine.call_workers("medusa_head_bytes") if side == "medusa" else None
            # Last: a profiler that was on once may slow down what follows, or end the engine (a
            # pipeline stage of plain vLLM 0.32 died in it under Ray on H100s).
            for result in [] if args.no_profile else results:
                level = result["concurrency"]
                chats = [([{"role": "user", "content": q.turns[0]}], {}) for q in pool[:level]]
                try:
                    engine.profile(chats, sampling | {"max_tokens": 32}, level)
                except RuntimeError as error:
                    print(f"{parallel} {side}: no profile, {str(error)[-300:]}", flush=True)
                    break
                result["collectives"] = collective_share(Path(traces))
        finally:
            engine.close()
    return {"parallel": parallel, "side": side, "start_s": started, "head_bytes_by_rank": heads,
            "results": results}, answers  # fmt: skip


def identical(left: dict[str, list], right: dict[str, list]) -> dict[str, Any]:
    """Answers that are equal, by concurrency."""
    return {
        level: {
            "equal": sum(a == b for a, b in zip(left[level], right[level], strict=True)),
            "of": len(left[level]),
        }
        for level in left
        if level in right
    }


def compare(entries: dict[str, dict], answers: dict[str, dict]) -> dict[str, Any]:
    """Speed-up over plain at the same parallelism, and which answers are those of one GPU."""
    found: dict[str, Any] = {}
    for parallel in PARALLEL:
        plain, medusa = f"{parallel} plain", f"{parallel} medusa"
        own: dict[str, Any] = {}
        if plain in entries and medusa in entries:
            before, after = (
                {r["concurrency"]: r["tokens_per_s"]["median"] for r in entries[name]["results"]}
                for name in (plain, medusa)
            )
            own["speedup"] = {level: after[level] / rate for level, rate in before.items()}
            own["medusa_equals_plain"] = identical(answers[medusa], answers[plain])
        for side in SIDES:
            name, one = f"{parallel} {side}", f"tp1 {side}"
            if parallel != "tp1" and name in entries and one in entries:
                own[f"{side}_equals_one_gpu"] = identical(answers[name], answers[one])
        if own:
            found[parallel] = own
    return found


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What two runs must have in common to be one record."""
    kept = ("executor", "concurrency", "rounds", "num_questions", "max_tokens", "nodes", "dtype",
            "max_model_len", "kv_cache_gb", "enforce_eager")  # fmt: skip
    names = {"model": Path(args.model).name, "heads": Path(args.heads).name}
    return names | {name: getattr(args, name) for name in kept}


def main(argv: list[str] | None = None) -> None:
    """Run what the record lacks, then write it anew after every engine."""
    args = parse_args(argv)
    wanted = [(parallel, side) for parallel in args.parallel for side in args.sides]
    if args.dry_run:
        for parallel, side in wanted:
            print(f"{parallel} {side}: {json.dumps(engine_arguments(args, parallel, side))}")
        return
    # Multicast over NVLink needs fabric rights that containers seldom have.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    settings, began = settings_of(args), time.monotonic()
    answers_file = args.out.with_suffix(".answers.json")
    entries: dict[str, dict] = {}
    answers: dict[str, dict] = {}
    if args.out.exists():
        record = json.loads(args.out.read_text())
        if record["settings"] != settings:
            raise SystemExit(f"{args.out} was made with other settings; choose another --out")
        entries = {f"{e['parallel']} {e['side']}": e for e in record["engines"]}
        answers = json.loads(answers_file.read_text())
    with ray_cluster(args.executor, 1 if args.parallel == ["tp1"] else 2):
        for parallel, side in wanted:
            name = f"{parallel} {side}"
            if name in entries:
                continue
            if args.time_limit is not None and time.monotonic() - began > args.time_limit:
                print(f"time is up, left out: {name}", flush=True)
                continue
            entries[name], answers[name] = measure(args, parallel, side)
            answers_file.parent.mkdir(parents=True, exist_ok=True)
            answers_file.write_text(json.dumps(answers))
            write_record(
                args.out,
                {
                    "benchmark": "cluster",
                    # Records are completed engine by engine; all of one are under one load.
                    "load": FINITE_BATCH,
                    "settings": settings,
                    "nccl": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
                    "engines": list(entries.values()),
                    "comparison": compare(entries, answers),
                },
            )


if __name__ == "__main__":
    main()
