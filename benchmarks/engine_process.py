"""A vLLM engine in a process of its own, driven over a pipe.

Two engines can then be alive at once and take turns in one run, and an idle one
sleeps in ``recv`` instead of spinning on a core that the other needs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from vllm_medusa.training.child_process import end_process

# Replaced on the command line by --start-timeout.
START_TIMEOUT_S = 900


def benchmarks_on_path() -> dict[str, str]:
    """Environment of an engine whose workers import a ``worker_extension_cls`` from here."""
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(folders)}


def _serve(pipe: Any, engine_args: dict[str, Any]) -> None:
    llm = None
    try:
        from vllm import LLM, SamplingParams

        if (folder := engine_args.pop("profile_to", None)) is not None:
            from vllm.config import ProfilerConfig

            engine_args["profiler_config"] = ProfilerConfig(
                profiler="torch", torch_profiler_dir=folder, torch_profiler_with_stack=False
            )
        llm = LLM(**engine_args)
        pipe.send(("ready", None))
        while (order := pipe.recv()) is not None:
            kind, requests, sampling, concurrency = order
            if kind == "next_logprobs":
                pipe.send(("done", _next_logprobs(llm, requests, SamplingParams)))
                continue
            if kind == "call":
                pipe.send(("done", llm.collective_rpc(requests, args=sampling)))
                continue
            if kind == "cache_tokens":
                pipe.send(("done", _cache_tokens(llm)))
                continue
            params = [SamplingParams(**(sampling | extra)) for _, extra in requests]
            if kind == "profile":
                llm.start_profile()
                _run(llm, [c for c, _ in requests], params, concurrency)
                llm.stop_profile()
                pipe.send(("done", None))
                continue
            run = _run(llm, [c for c, _ in requests], params, concurrency, kind == "stream")
            pipe.send(("done", run))
    except EOFError:
        pass
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    finally:
        if llm is not None:
            # Its own process would outlive this one and keep the GPU's memory.
            llm.llm_engine.engine_core.shutdown()


def _token_ids(tokenizer: Any, conversation: list) -> list[int]:
    """Prompt of a list of messages; token ids stay what they are."""
    if conversation and isinstance(conversation[0], int):
        return conversation
    return list(
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    )


def _run(
    llm: Any, conversations: list, params: list, concurrency: int, stream: bool = False
) -> dict[str, Any]:
    """Answer all, with ``concurrency`` requests in flight until none is left to start.

    Waves would measure how unevenly answers end: a slot that is done would wait for the slowest.
    With ``stream`` every step's tokens are handed out, and answers hold ``first_token_seconds``.
    """
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": _token_ids(tokenizer, c)} for c in conversations]
    engine, answers, in_flight, started = llm.llm_engine, [None] * len(prompts), 0, 0
    begin = time.perf_counter()
    starts, firsts = [0.0] * len(prompts), [None] * len(prompts)
    while started < len(prompts) or in_flight:
        while started < len(prompts) and in_flight < concurrency:
            starts[started] = time.perf_counter()
            params[started].output_kind = kind
            engine.add_request(str(started), prompts[started], params[started])
            started, in_flight = started + 1, in_flight + 1
        for output in engine.step():
            index, now = int(output.request_id), time.perf_counter()
            if firsts[index] is None:
                firsts[index] = now - starts[index]
            if output.finished:
                in_flight -= 1
                answers[index] = _answer(output, now - starts[index])
                if stream:
                    answers[index]["first_token_seconds"] = firsts[index]
    return {"answers": answers, "seconds": time.perf_counter() - begin}


def _cache_tokens(llm: Any) -> int | None:
    """Tokens that the KV cache holds; None where the front end was not told."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks and cache.num_gpu_blocks * cache.block_size


def _answer(output: Any, seconds: float) -> dict[str, Any]:
    """What a benchmark keeps of a finished request."""
    completion = output.outputs[0]
    spec = completion.spec_decode_metrics
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "seconds": seconds,
        "accepted_histogram": None if spec is None else list(spec.histogram),
    }


def _next_logprobs(llm: Any, prompts: list[list[int]], sampling_params: Any) -> list[dict]:
    """{token: log probability} of the 20 likeliest next tokens after each prompt."""
    params = sampling_params(temperature=0.0, max_tokens=1, logprobs=20)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        for output in outputs
    ]


class EngineProcess:
    """One engine; ``run`` blocks until its answers are there.

    Parameters
    ----------
    name : str
        For messages.
    engine_args : dict
        Keyword arguments of ``vllm.LLM``; and ``profile_to``, a folder for :meth:`profile`.
    environment : dict, optional
        Environment variables of this engine alone.
    """

    def __init__(
        self, name: str, engine_args: dict[str, Any], environment: dict[str, str] | None = None
    ):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, engine_args))
        # vLLM reads some of them while it is imported.
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        child.close()

    def _receive(self, timeout: float | None) -> Any:
        if timeout is not None and not self._pipe.poll(timeout):
            raise TimeoutError(f"engine {self.name!r} said nothing for {timeout:.0f} s")
        kind, value = self._pipe.recv()
        if kind == "failed":
            raise RuntimeError(f"engine {self.name!r} failed:\n{value}")
        return value

    def wait_ready(self, timeout: float = START_TIMEOUT_S) -> None:
        """Block until the engine has loaded and compiled."""
        self._receive(timeout)

    def run(
        self,
        conversations: list[tuple[list[dict], dict]],
        sampling: dict[str, Any],
        concurrency: int = 1,
        stream: bool = False,
    ) -> dict[str, Any]:
        """Answer conversations; each comes with sampling parameters of its own on top.

        A conversation is a list of messages, or of token ids. With ``stream`` every answer tells
        when its first token came.
        """
        kind = "stream" if stream else "chat"
        self._pipe.send((kind, conversations, sampling, concurrency))
        return self._receive(None)

    def profile(
        self, conversations: list[tuple[list[dict], dict]], sampling: dict, concurrency: int
    ) -> None:
        """Answer under torch's profiler; every worker leaves a trace in ``profile_to``."""
        self._pipe.send(("profile", conversations, sampling, concurrency))
        self._receive(None)

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        """What a method of the worker class returns, by rank."""
        self._pipe.send(("call", method, args, None))
        return self._receive(None)

    def cache_tokens(self) -> int | None:
        """Tokens that the KV cache holds, where the engine tells."""
        self._pipe.send(("cache_tokens", None, None, None))
        return self._receive(None)

    def next_logprobs(self, prompts: list[list[int]]) -> list[dict[int, float]]:
        """Log probabilities of the likeliest next tokens after each token-id prompt."""
        self._pipe.send(("next_logprobs", prompts, None, None))
        return self._receive(None)

    def close(self) -> None:
        """End the process, and whatever it started and left behind.

        vLLM's engine core outlives its parent under Ray on GPUs, and with it the GPUs that its
        workers hold: the next engine waited for them for good.
        """
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        end_process(self._process, 30)
