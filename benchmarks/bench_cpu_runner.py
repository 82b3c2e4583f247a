"""Step time of vLLM's V2 runner on the fall-backs against its V1 runner, on a CPU.

    python benchmarks/bench_cpu_runner.py --rounds 15 --tokens 128

A tiny random Llama, so that the runner and not the model is measured. Each runner has a
process of its own; the two take turns in every round. Per case: wall milliseconds and CPU
milliseconds of a step. CPU time does not count the waiting that other programs cause.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import spread, write_record

HERE = Path(__file__).resolve().parent
ENGINES = HERE.parent / "tests" / "kernels"
RUNNERS = ("v1", "v2")
START_TIMEOUT_S = 600
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "seed": 3},
    "seeded, top-p": {"temperature": 0.8, "seed": 3, "top_p": 0.9},
}


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128, help="steps of one measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu_runner.json")
    return parser.parse_args()


def serve(runner: str, model: Path, tokens: int, pipe: Any) -> None:
    """Start an engine and time the batches that come through the pipe."""
    sys.path.insert(0, str(ENGINES))
    # vLLM starts a worker class by name, which the path must lead to.
    os.environ["PYTHONPATH"] = str(ENGINES)
    import cpu_engine

    engine = cpu_engine.make_engine(runner, model)
    from vllm import SamplingParams

    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        batch, sampling = case
        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, detokenize=False, **SAMPLING[sampling]
        )
        wall, cpu = time.perf_counter(), time.process_time()
        engine.generate(cpu_engine.prompts(batch), params, use_tqdm=False)
        pipe.send([1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)])


class Engine:
    """One runner's process."""

    def __init__(self, runner: str, model: Path, tokens: int):
        context = multiprocessing.get_context("spawn")
        self.runner, self.tokens = runner, tokens
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(runner, model, tokens, child))
        self._process.start()
        child.close()

    def receive(self) -> Any:
        """Wait for the next answer."""
        if not self._pipe.poll(START_TIMEOUT_S):
            raise TimeoutError(f"runner {self.runner} said nothing for {START_TIMEOUT_S} s")
        return self._pipe.recv()

    def step_ms(self, case: tuple[int, str]) -> tuple[float, float]:
        """(wall, CPU) milliseconds of a step."""
        self._pipe.send(case)
        wall, cpu = self.receive()
        return wall / self.tokens, cpu / self.tokens

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def measure(engines: list[Engine], case: tuple[int, str], rounds: int) -> dict[str, Any]:
    """Take turns for `rounds` rounds, after one that does not count."""
    samples: dict[str, list] = {engine.runner: [] for engine in engines}
    for number in range(rounds + 1):
        # The order alternates, so that neither always follows the other.
        for engine in engines if number % 2 else reversed(engines):
            times = engine.step_ms(case)
            if number:
                samples[engine.runner].append(times)
    result: dict[str, Any] = {"batch": case[0], "sampling": case[1]}
    for runner, times in samples.items():
        walls, cpus = zip(*times, strict=True)
        result[runner] = {"wall_ms": spread(list(walls)), "cpu_ms": spread(list(cpus))}
    for clock in ("wall_ms", "cpu_ms"):
        v1, v2 = (result[runner][clock]["median"] for runner in RUNNERS)
        result[f"v2_over_v1_{clock}"] = v2 / v1
    return result


def cpu_name() -> str:
    """Model of this processor, as far as the system tells."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def main() -> None:
    """Measure every case, print a table, write the record."""
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ENGINES))
    import cpu_engine

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        cpu_engine.make_model(model)
        engines = [Engine(runner, model, args.tokens) for runner in RUNNERS]
        for engine in engines:
            engine.receive()
        cases = []
        print("batch  sampling        V1 ms  V2 ms  ratio   CPU: V1     V2  ratio")
        for batch in args.batches:
            for sampling in SAMPLING:
                case = measure(engines, (batch, sampling), args.rounds)
                cases.append(case)
                wall, cpu = (
                    [case[runner][clock]["median"] for runner in RUNNERS]
                    for clock in ("wall_ms", "cpu_ms")
                )
                print(
                    f"{batch:5}  {sampling:13}  {wall[0]:6.2f} {wall[1]:6.2f} "
                    f"{wall[1] / wall[0]:6.2f}    {cpu[0]:6.2f} {cpu[1]:6.2f} "
                    f"{cpu[1] / cpu[0]:6.2f}"
                )
        for engine in engines:
            engine.close()
    write_record(
        args.out,
        {
            "what": "milliseconds of a decode step of a tiny float32 Llama (vocabulary 1024)",
            "cpu": {"model": cpu_name(), "cores": os.cpu_count(), "threads": args.threads},
            "rounds": args.rounds,
            "tokens": args.tokens,
            "seeds": {"model": 0, "engine": 0, "sampling": 3},
            "cases": cases,
        },
    )


if __name__ == "__main__":
    main()
