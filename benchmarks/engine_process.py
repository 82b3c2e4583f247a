"""A vLLM engine in a process of its own, driven over a pipe.

Two engines can then be alive at once and take turns in one run, and an idle one
sleeps in ``recv`` instead of spinning on a core that the other needs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from load import FINITE_BATCH, answer_all

from vllm_medusa.training.child_process import end_process

START_TIMEOUT_S = 900
# ``max_num_seqs`` of engines on a GPU at least. vLLM captures graphs of at most twice as many rows:
# with as few slots as requests in flight, plain steps with a prompt in them would have none.
LEAST_GPU_SLOTS = 256
LEAST_CPU_SLOTS = 8
MOST_REASON_CHARACTERS = 300
# A process whose pipe is closed gets this long to tell its exit code.
_END_S = 10


def num_slots(given: int | None, concurrency: list[int]) -> int:
    """``max_num_seqs`` of all engines of a benchmark: as given, or enough for every level."""
    least = LEAST_GPU_SLOTS if torch.cuda.is_available() else LEAST_CPU_SLOTS
    return given or max(least, *concurrency)


def benchmarks_on_path() -> dict[str, str]:
    """Environment of an engine whose workers import a ``worker_extension_cls`` from here."""
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(folders)}


class EngineError(RuntimeError):
    """The engine of this ``name`` failed; ``reason`` says in one line how."""

    def __init__(self, name: str, reason: str, details: str = ""):
        super().__init__(f"engine {name!r} failed: {reason}\n{details}".rstrip())
        self.name, self.reason = name, reason


def one_line(error: BaseException) -> str:
    """An exception's kind and words, shortened to what a table's note holds."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:MOST_REASON_CHARACTERS]


def _serve(pipe: Any, engine_args: dict[str, Any]) -> None:
    llm = None
    try:
        from vllm import LLM

        if (folder := engine_args.pop("profile_to", None)) is not None:
            from vllm.config import ProfilerConfig

            engine_args["profiler_config"] = ProfilerConfig(
                profiler="torch", torch_profiler_dir=folder, torch_profiler_with_stack=False
            )
        llm = LLM(**engine_args)
        pipe.send(("ready", None))
        while (order := pipe.recv()) is not None:
            kind, *arguments = order
            pipe.send(("done", _ORDERS[kind](llm, *arguments)))
    except EOFError:
        pass
    except BaseException as error:
        pipe.send(("failed", (one_line(error), traceback.format_exc())))
    finally:
        if llm is not None:
            # Its own process would outlive this one and keep the GPU's memory.
            llm.llm_engine.engine_core.shutdown()


def token_ids(tokenizer: Any, conversation: list) -> list[int]:
    """Prompt of a list of messages; token ids stay what they are."""
    if conversation and isinstance(conversation[0], int):
        return conversation
    return list(
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    )


def _run(
    llm: Any, requests: list, sampling: dict, concurrency: int, load: str, stream: bool
) -> dict[str, Any]:
    """Answer conversations; with ``stream`` every step's tokens are handed out."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
    params = [SamplingParams(**(sampling | extra), output_kind=kind) for _, extra in requests]
    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": token_ids(tokenizer, chat)} for chat, _ in requests]
    return answer_all(llm.llm_engine, prompts, params, concurrency, load, stream)


def _profile(llm: Any, requests: list, sampling: dict, concurrency: int) -> None:
    llm.start_profile()
    _run(llm, requests, sampling, concurrency, FINITE_BATCH, False)
    llm.stop_profile()


def _call_workers(llm: Any, method: str, arguments: tuple) -> list[Any]:
    return llm.collective_rpc(method, args=arguments)


def _cache_tokens(llm: Any) -> int | None:
    """Tokens that the KV cache holds; None where the front end was not told."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks and cache.num_gpu_blocks * cache.block_size


def _next_logprobs(llm: Any, prompts: list[list[int]]) -> list[dict]:
    """{token: log probability} of the 20 likeliest next tokens after each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        for output in outputs
    ]


_ORDERS = {
    "run": _run,
    "profile": _profile,
    "call_workers": _call_workers,
    "cache_tokens": _cache_tokens,
    "next_logprobs": _next_logprobs,
}


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
        self.name, self._is_ready = name, False
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, engine_args))
        # vLLM reads some of them while it is imported.
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        child.close()

    def _receive(self, timeout: float | None = None) -> Any:
        try:
            if timeout is not None and not self._pipe.poll(timeout):
                raise TimeoutError(f"engine {self.name!r} said nothing for {timeout:.0f} s")
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(_END_S)
            code = self._process.exitcode
            raise EngineError(self.name, f"its process ended with code {code}") from error
        if kind == "failed":
            raise EngineError(self.name, *value)
        return value

    def _ask(self, *order: Any) -> Any:
        # What an engine that is gone had to say is read below.
        with contextlib.suppress(ConnectionError):
            self._pipe.send(order)
        return self._receive()

    def wait_ready(self, timeout: float = START_TIMEOUT_S) -> None:
        """Block until the engine has loaded and compiled; at once where it did before."""
        if not self._is_ready:
            self._receive(timeout)
            self._is_ready = True

    def run(
        self,
        conversations: list[tuple[list, dict]],
        sampling: dict[str, Any],
        concurrency: int = 1,
        *,
        load: str = FINITE_BATCH,
        stream: bool = False,
    ) -> dict[str, Any]:
        """Answer conversations; each comes with sampling parameters of its own on top.

        A conversation is a list of messages, or of token ids.  With ``stream`` every answer tells
        when its first token came.  What a ``load`` is and what comes back: :func:`load.answer_all`.
        """
        return self._ask("run", conversations, sampling, concurrency, load, stream)

    def profile(
        self, conversations: list[tuple[list, dict]], sampling: dict, concurrency: int
    ) -> None:
        """Answer under torch's profiler; every worker leaves a trace in ``profile_to``."""
        self._ask("profile", conversations, sampling, concurrency)

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        """What a method of the worker class returns, by rank."""
        return self._ask("call_workers", method, args)

    def cache_tokens(self) -> int | None:
        """Tokens that the KV cache holds, where the engine tells."""
        return self._ask("cache_tokens")

    def next_logprobs(self, prompts: list[list[int]]) -> list[dict[int, float]]:
        """Log probabilities of the likeliest next tokens after each token-id prompt."""
        return self._ask("next_logprobs", prompts)

    def close(self) -> None:
        """End the process, and whatever it started and left behind.

        vLLM's engine core outlives its parent under Ray on GPUs, and with it the GPUs that its
        workers hold: the next engine waited for them for good.
        """
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        end_process(self._process, 30)
