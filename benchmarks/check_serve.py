"""Start ``vllm serve --speculative-model medusa:HEADS``, stream a few answers, record the metrics.

    python benchmarks/check_serve.py --model MODEL --heads HEADS --out record.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from records import write_record

from vllm_medusa.demo.chat import ask
from vllm_medusa.demo.server import free_port

QUESTIONS = (
    "Explain in three sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "List five tips for learning to cook.",
    "What is a hash table?",
)


def wait_healthy(url: str, server: subprocess.Popen, timeout: float) -> None:
    """Poll ``/health`` until the server answers or ends."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"the server was not up after {timeout:.0f} s")


def stream_answer(url: str, model: str, question: str, max_tokens: int) -> dict[str, Any]:
    """One greedy chat completion, streamed."""
    pieces: list[str] = []
    answer = ask(url, model, question, max_tokens, pieces.append)
    return {
        "question": question,
        "answer": answer.text,
        "chunks": sum(map(bool, pieces)),
        "tokens": answer.tokens,
        "seconds": answer.seconds,
    }


def spec_decode_metrics(url: str) -> dict[str, float]:
    """Samples of ``/metrics`` that speak of speculation."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "spec_decode" in sample.name and not sample.name.endswith("_created"):
                position = sample.labels.get("position")
                found[sample.name + (f"[{position}]" if position else "")] = sample.value
    return found


def main() -> None:
    """Serve, ask, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--heads", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=Path("serve.log"))
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--timeout", type=float, default=400)
    parser.add_argument("serve_args", nargs="*", help="after --: passed to vllm serve")
    args = parser.parse_args()
    port = free_port()
    url, name = f"http://127.0.0.1:{port}", Path(args.model).name
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model]
    command += ["--speculative-model", f"medusa:{args.heads}", "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *args.serve_args]
    with args.log.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_healthy(url, server, args.timeout)
            stream_answer(url, name, "Hello!", 16)
            answers = [stream_answer(url, name, q, args.max_tokens) for q in QUESTIONS]
            metrics = spec_decode_metrics(url)
        finally:
            server.terminate()
            server.wait(60)
    accepted = metrics["vllm:spec_decode_num_accepted_tokens_total"]
    per_step = 1 + accepted / metrics["vllm:spec_decode_num_drafts_total"]
    engine_lines = [
        line.strip()
        for line in args.log.read_text().splitlines()
        if "SpecDecoding metrics" in line or "Medusa:" in line or "Capturing CUDA graphs" in line
    ]
    write_record(
        args.out,
        {
            "benchmark": "serve",
            "model": name,
            "heads": Path(args.heads).name,
            "serve_args": args.serve_args,
            "answers": answers,
            "tokens_per_step": per_step,
            "metrics": metrics,
            "log_lines": engine_lines[:6],
        },
    )
    for answer in answers:
        rate = answer["tokens"] / answer["seconds"]
        print(f"{answer['tokens']} tokens in {answer['chunks']} chunks, {rate:.0f} tok/s")
    print(f"tokens per step {per_step:.2f}")


if __name__ == "__main__":
    main()
