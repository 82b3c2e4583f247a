"""The load that a benchmark puts on an engine: a finite batch of requests, or a closed loop.

A finite batch keeps ``concurrency`` requests in flight until none is left to start; then the slots
run empty.  Plain decoding's answers end together, those of speculation unevenly, so that the
emptying costs the faster side more.  A server's load does not end: a closed loop keeps every slot
busy from before the first measured request until after the last one.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

CLOSED_LOOP = "closed loop"
FINITE_BATCH = "finite batch"
LOADS = (CLOSED_LOOP, FINITE_BATCH)
# A mean over fewer requests per slot depends on which ones they are.
MEASURED_PER_SLOT = 3


class Request(NamedTuple):
    """One request; ``place`` among the measured ones, None of one that only fills a slot."""

    name: str
    prompt: dict[str, list[int]]
    params: Any
    place: int | None


def num_measured(wanted: int, concurrency: int) -> int:
    """How many requests a closed loop measures: ``wanted``, or several per slot if that is more.

    Examples
    --------
    >>> num_measured(16, 1), num_measured(16, 8)
    (16, 24)
    """
    return wanted if concurrency == 1 else max(wanted, MEASURED_PER_SLOT * concurrency)


def request_stream(
    prompts: list[dict], params: list, concurrency: int, load: str
) -> Iterator[Request]:
    """Requests in the order in which they start; those of a closed loop never end.

    Its first ``concurrency`` are of lengths from ``1 / concurrency`` to all of ``max_tokens``, so
    that the measured ones, after them, start and end one by one as in a server.  At a concurrency
    of 1 the slot is full as it is, and both loads are the measured requests alone.
    """
    is_loop = load == CLOSED_LOOP and concurrency > 1
    for index in range(concurrency if is_loop else 0):
        # From the end of the list: the measured ones after them are others.
        short = copy.copy(params[-1 - index % len(params)])
        short.max_tokens = -(-short.max_tokens * (index + 1) // concurrency)
        yield Request(f"lead-in {index}", prompts[-1 - index % len(prompts)], short, None)
    for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        yield Request(str(index), prompt, own, index)
    for index in itertools.count() if is_loop else ():
        place = index % len(prompts)
        yield Request(f"filler {index}", prompts[place], params[place], None)


def answer_all(
    engine: Any,
    prompts: list[dict],
    params: list,
    concurrency: int,
    load: str = FINITE_BATCH,
    stream: bool = False,
) -> dict[str, Any]:
    """Answer all prompts, with ``concurrency`` requests in flight.

    Parameters
    ----------
    engine : vllm.v1.engine.llm_engine.LLMEngine
        Without unfinished requests, and left so.
    prompts : list of dict
        Prompts as vLLM takes them.
    params : list of vllm.SamplingParams
        One for each prompt.
    concurrency : int
        Requests in flight.
    load : str
        One of :data:`LOADS`.
    stream : bool
        Answers hold ``first_token_seconds``; ``params`` must ask for every step's tokens.

    Returns
    -------
    dict
        ``answers`` in the order of ``prompts``.  ``seconds_with_tail``: from the first request's
        start to the last measured one's end.  ``seconds``: the same for a finite batch.  For a
        closed loop what the answers cost of full slots, the sum of their own seconds over
        ``concurrency``: by Little's law tokens over it are the throughput of a load without end.

    Raises
    ------
    ValueError
        ``load`` is unknown.
    """
    if load not in LOADS:
        raise ValueError(f"load is {load!r}, expected one of {', '.join(map(repr, LOADS))}")
    stream_of = request_stream(prompts, params, concurrency, load)
    answers: list[Any] = [None] * len(prompts)
    places, starts, firsts = {}, {}, {}
    left, begin = len(prompts), time.perf_counter()
    while left:
        for request in itertools.islice(stream_of, concurrency - len(places)):
            places[request.name] = request.place
            starts[request.name] = time.perf_counter()
            engine.add_request(request.name, request.prompt, request.params)
        for output in engine.step():
            name, now = output.request_id, time.perf_counter()
            firsts.setdefault(name, now - starts[name])
            if not output.finished or (place := places.pop(name)) is None:
                continue
            left -= 1
            answers[place] = finished_answer(output, now - starts[name])
            if stream:
                answers[place]["first_token_seconds"] = firsts[name]
    wall = time.perf_counter() - begin
    # Fillers; their time is nobody's.
    engine.abort_request(list(places))
    while engine.has_unfinished_requests():
        engine.step()
    is_loop = load == CLOSED_LOOP and concurrency > 1
    busy = sum(answer["seconds"] for answer in answers) / concurrency
    return {"answers": answers, "seconds": busy if is_loop else wall, "seconds_with_tail": wall}


def finished_answer(output: Any, seconds: float) -> dict[str, Any]:
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
