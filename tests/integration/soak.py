"""Serve many mixed requests through AsyncLLM; report answers, counts and what is left of them.

    python soak.py ORDER.json RESULT.json

ORDER: {"engine": {engine arguments}, "count": requests, "clients": how many at once, "keep":
every which answer is kept, "async": async scheduling, "seconds": stop after so long (null:
never)}.  RESULT is written
anew from time to time, so that a run that is stopped leaves how far it got.

A client is a task that takes the next request, streams it and maybe leaves early, by
closing its stream or by being cancelled: `vllm bench serve` neither mixes sampling options
nor leaves.  AsyncLLM is what the HTTP server stands on; without HTTP the same two cores
serve several times as many requests, and the engine's state can be looked into.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import soak_traffic
from engine_job import sampling_params, set_async_scheduling
from state_probe import held_strings, resident_kilobytes

PREFIX = "soak-"
IDLE_S = 60
MOST_FILLS = 20
MEMORY_SAMPLES = 100


class Soak:
    """One engine under load."""

    def __init__(self, engine: Any, order: dict[str, Any]):
        self.engine, self.order = engine, order
        self.next_index = 0
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.answers: dict[int, dict[str, Any]] = {}
        self.errors: list[str] = []
        self.memory: list[tuple[int, int, int]] = []  # requests, kilobytes here, in the engine
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    async def client(self) -> None:
        """Ask one request after another."""
        limit = self.order["seconds"] or float("inf")
        while self.next_index < self.order["count"] and self.seconds < limit:
            index, self.next_index = self.next_index, self.next_index + 1
            await self.ask(index)

    async def ask(self, index: int) -> None:
        """One request from its arrival until its client has what it wants."""
        asked = soak_traffic.request(index)
        self.kinds[asked["kind"]] += 1
        answer: dict[str, Any] = {"tokens": [], "finished": False}
        task = asyncio.create_task(self.stream(index, asked, answer))
        try:
            if asked["abort"] == 0:
                await asyncio.sleep(random.random() / 20)
                task.cancel()
            await task
        except asyncio.CancelledError:
            self.counts["cancelled"] += 1
        except Exception as error:
            self.errors.append(f"{index} {asked['kind']}: {type(error).__name__}: {error}"[:500])
        self.counts["requests"] += 1
        self.counts["tokens"] += len(answer["tokens"])
        self.counts["finished" if answer["finished"] else "left early"] += 1
        if index % self.order["keep"] == 0 and soak_traffic.is_comparable(asked):
            self.answers[index] = answer

    async def stream(self, index: int, asked: dict[str, Any], answer: dict[str, Any]) -> None:
        """Read the output of one request, of several completions the first."""
        from vllm import SamplingParams

        params = sampling_params(SamplingParams, asked["sampling"])
        prompt = {"prompt_token_ids": asked["prompt"]}
        stream = self.engine.generate(prompt, params, f"{PREFIX}{index}-")
        async with contextlib.aclosing(stream):
            async for output in stream:
                for completion in output.outputs:
                    if completion.index == 0:
                        answer["tokens"] = list(completion.token_ids)
                answer["finished"] = output.finished
                if asked["abort"] is not None and len(answer["tokens"]) >= asked["abort"]:
                    return

    async def watch_memory(self, write: Any) -> None:
        """Note both processes' memory at even distances, and write what is known so far."""
        every = max(1, self.order["count"] // MEMORY_SAMPLES)
        while True:
            await asyncio.sleep(0.2)
            done = self.counts["requests"]
            if not self.memory or done >= self.memory[-1][0] + every:
                (engine,) = await self.engine.collective_rpc("resident_memory")
                self.memory.append((done, resident_kilobytes(), engine))
                write(self.result())

    async def quiet_state(self) -> dict[str, Any]:
        """The engine's and this process's state once nothing is left to do."""
        deadline = time.monotonic() + IDLE_S
        while True:
            gc.collect()
            (state,) = await self.engine.collective_rpc("request_state", args=(PREFIX,))
            if state["idle"] or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        processor = self.engine.output_processor
        state["held_in_front"] = held_strings([processor, self.engine.engine_core], PREFIX)
        state["front_requests"] = len(processor.request_states) + len(processor.parent_requests)
        return state

    async def filled_state(self) -> dict[str, Any]:
        """The state after a plain request was in every slot: none shows its former options.

        On a busy machine a request may be over before the last one arrives, and some slot
        stay as it was: then once more.
        """
        for _ in range(MOST_FILLS):
            await self.fill_slots()
            state = await self.quiet_state()
            if state["simple_slots"] == self.order["engine"]["max_num_seqs"]:
                break
        return state

    async def fill_slots(self) -> None:
        """As many plain requests as there are slots, each of one block, so that all fit."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=28, ignore_eos=True)
        params.extra_args = {"medusa_nodes": 0}

        async def ask(number: int) -> None:
            prompt = {"prompt_token_ids": [5, 6, 7 + number]}
            async for _ in self.engine.generate(prompt, params, f"{PREFIX}fill-{number}-"):
                pass

        seqs = self.order["engine"]["max_num_seqs"]
        await asyncio.gather(*(ask(number) for number in range(seqs)))

    def result(self) -> dict[str, Any]:
        """What is known so far."""
        return {
            "seconds": self.seconds,
            "counts": dict(self.counts),
            "kinds": dict(self.kinds),
            "answers": self.answers,
            "errors": self.errors,
            "memory": self.memory,
            "metrics": metrics(),
        }


def metrics() -> dict[str, float]:
    """Counters of this process's Prometheus registry that prove what happened."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    found: dict[str, float] = {}
    for metric in get_metrics_snapshot():
        value = getattr(metric, "value", None)
        if value is not None:
            name = metric.name.removeprefix("vllm:")
            if reason := metric.labels.get("finished_reason"):
                name = f"{name} {reason}"
            found[name] = found.get(name, 0) + value
    return found


async def run(order: dict[str, Any], target: Path) -> None:
    """The whole of it."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    def write(result: dict[str, Any]) -> None:
        target.with_suffix(".part").write_text(json.dumps(result))
        target.with_suffix(".part").rename(target)

    random.seed(0)
    set_async_scheduling(order["async"])
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(worker_extension_cls="state_probe.StateProbe", **order["engine"])
    )
    try:
        soak = Soak(engine, order)
        before = await soak.filled_state()
        first = metrics()
        soak.started = time.monotonic()
        watcher = asyncio.create_task(soak.watch_memory(write))
        await asyncio.gather(*(soak.client() for _ in range(order["clients"])))
        watcher.cancel()
        result = soak.result()
        left = await soak.quiet_state()
        states = {"before": before, "left": left, "after": await soak.filled_state()}
        write(result | {"first_metrics": first, "states": states, "complete": True})
    finally:
        engine.shutdown()


def main() -> None:
    """Run the order."""
    source, target = map(Path, sys.argv[1:3])
    asyncio.run(run(json.loads(source.read_text()), target))


if __name__ == "__main__":
    main()
