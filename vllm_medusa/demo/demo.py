"""The run behind `make demo`: unpack the model, serve it twice, compare.

    python -m vllm_medusa.demo.demo [--tokens N] [--questions N] [--compile] [--dtype float32]

Needs the environment that ``bootstrap.py`` makes.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from vllm_medusa.demo import acceptance, chat, host, report, unpack_model
from vllm_medusa.demo.acceptance import Acceptance
from vllm_medusa.demo.chat import Answer
from vllm_medusa.demo.failure import StepError
from vllm_medusa.demo.questions import MAX_TOKENS, QUESTIONS, WARM_UP
from vllm_medusa.demo.server import Server, ServerPlan

HEADS = Path(__file__).resolve().parents[1] / "assets" / "smollm2-135m-instruct"
WARM_UP_TOKENS = 24
DTYPES = ("bfloat16", "float32")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=MAX_TOKENS, help="longest answer")
    parser.add_argument(
        "--questions", type=int, default=len(QUESTIONS), help=f"how many of {len(QUESTIONS)}"
    )
    parser.add_argument("--heads", type=Path, default=HEADS, help="folder of Medusa heads")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="serve with torch.compile; default: on a GPU only, where it pays within the demo",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of both servers; default: the faster one")
    options = parser.parse_args(argv)
    if not 1 <= options.questions <= len(QUESTIONS):
        parser.error(f"--questions {options.questions}: expected 1 to {len(QUESTIONS)}")
    if not 1 <= options.tokens <= 1024:
        parser.error(f"--tokens {options.tokens}: expected 1 to 1024")
    return options


def fast_dtype(device: str) -> str:
    """float32 on a CPU: Medusa's row product reads the weights as bfloat16 there anyway.

    On two AVX-512 cores it answers at 65 tok/s in float32 and 50 in bfloat16; plain vLLM at 29
    and 33. Without AVX-512 a bfloat16 row costs as much as a step.
    """
    return "bfloat16" if device == "cuda" else "float32"


def run(options: argparse.Namespace) -> None:
    """Unpack, serve with and without Medusa, compare and keep the record."""
    begun = time.monotonic()
    heads = options.heads.absolute()
    if not (heads / "config.json").exists():
        raise StepError(
            f"No Medusa heads in {heads}: give a folder with config.json and "
            "medusa_lm_head.safetensors, or leave --heads out."
        )
    cache, device = unpack_model.cache_folder(), host.detect_device()
    dtype = options.dtype or fast_dtype(device)
    report.step("1/3 The model")
    model = unpack_model.model_folder()
    with report.progress_bar() as progress:
        written = unpack_model.unpack(model, progress)
    report.console.print(f"{'Unpacked to' if written else 'Re-using'} {model}", soft_wrap=True)

    wants_compile = device == "cuda" if options.compile is None else options.compile
    eager = not (wants_compile and host.can_compile_extensions())
    questions = QUESTIONS[: options.questions]
    report.step("2/3 vLLM with Medusa heads")
    plan = ServerPlan("medusa", model, cache, device, heads, eager, dtype)
    drafted, medusa = serve_and_ask(plan, lambda url: ask_showing(url, model, questions, options))
    report.step("3/3 The same server without Medusa, same questions")
    plan = ServerPlan("plain", model, cache, device, None, eager, dtype)
    plain = serve_and_ask(plan, lambda url: ask_counting(url, model, questions, options))

    total = total_acceptance(drafted)
    rows = [report.Comparison(*row) for row in zip(questions, medusa, plain, drafted, strict=True)]
    report.tables(rows, total)
    record = keep_record(cache, plan, rows, total)
    seconds = time.monotonic() - begun
    report.console.print(f"Done after {seconds:.0f} s; record in {record}", soft_wrap=True)


def serve_and_ask(plan: ServerPlan, work: Callable):
    """Start a server, wait for it, do ``work`` with its URL, stop it."""
    with Server(plan) as server:
        with report.progress_bar() as progress:
            server.wait_until_ready(progress)
        chat.ask(server.url, plan.model.name, WARM_UP, WARM_UP_TOKENS, show=lambda _piece: None)
        return work(server.url)


def ask_showing(
    url: str, model: Path, questions: tuple[str, ...], options: argparse.Namespace
) -> tuple[list[Acceptance], list[Answer]]:
    """Ask every question, streaming the answers to the screen, with its acceptance."""
    counts, answers = [], []
    before = acceptance.read(url)
    for question in questions:
        report.question(question)
        answers.append(chat.ask(url, model.name, question, options.tokens, report.stream))
        now = acceptance.read(url)
        counts.append(now.since(before))
        before = now
        report.answer_line(answers[-1], counts[-1])
    return counts, answers


def ask_counting(
    url: str, model: Path, questions: tuple[str, ...], options: argparse.Namespace
) -> list[Answer]:
    """Ask every question, showing a bar in place of the answers."""
    answers = []
    with report.progress_bar() as progress:
        for number, question in enumerate(questions):
            progress("answering", number, len(questions))
            answers.append(
                chat.ask(url, model.name, question, options.tokens, show=lambda _piece: None)
            )
        progress("answered", len(questions), len(questions))
    return answers


def total_acceptance(parts: list[Acceptance]) -> Acceptance:
    """Add up counts."""
    depths = max(len(part.accepted_at) for part in parts)
    padded = [part.accepted_at + (0,) * (depths - len(part.accepted_at)) for part in parts]
    return Acceptance(
        steps=sum(part.steps for part in parts),
        accepted=sum(part.accepted for part in parts),
        accepted_at=tuple(map(sum, zip(*padded, strict=True))),
    )


def keep_record(
    cache: Path, plan: ServerPlan, rows: list[report.Comparison], total: Acceptance
) -> Path:
    """Write what was measured to ``demo.json`` in the cache folder."""
    record = cache / "demo.json"
    content = {
        "device": host.nvidia_gpus()[:1] if plan.device == "cuda" else "cpu",
        "cores": len(host.usable_cores()),
        "eager": plan.eager,
        "dtype": plan.dtype,
        "tokens_per_step": total.tokens_per_step,
        "acceptance_by_depth": total.rate_by_depth,
        "rows": [asdict(row) for row in rows],
    }
    record.write_text(json.dumps(content, indent=1) + "\n")
    return record


def raise_on_signal(number: int, _frame) -> None:
    """Turn a termination signal into an exception, so that servers are stopped."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; a known failure is one sentence."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, raise_on_signal)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        run(options)
    except StepError as problem:
        print("\n" + problem.sentence, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
