"""Answers from a real vLLM engine with Medusa, and what each of its steps accepted."""

import json
import multiprocessing
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_medusa.training.child_process import end_process
from vllm_medusa.training.prompt_files import Prompt

# An engine that has answered ends within a second or two, or never.
EXIT_S = 15


@dataclass(frozen=True)
class ServedAnswer:
    """One answered turn."""

    prompt_index: int
    category: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    # draft tokens accepted by each verification step, in order
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class ServedRun:
    """All answers of one engine and the tree that it ran."""

    answers: tuple[ServedAnswer, ...]
    paths: tuple[tuple[int, ...], ...]


def serve_prompts(
    engine_args: dict[str, Any], prompts: Sequence[Prompt], sampling: dict[str, Any]
) -> ServedRun:
    """Answer every turn of every prompt in a process of its own.

    The process gives all of its memory back at its end, which an engine within this one would
    not, and the base model is loaded a second time afterwards.

    Parameters
    ----------
    engine_args : dict
        Keyword arguments of ``vllm.LLM``, with or without speculation.
    prompts : sequence of Prompt
    sampling : dict
        Keyword arguments of ``vllm.SamplingParams``.
    """
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory(prefix="medusa-eval-") as folder:
        result = Path(folder) / "answers.json"
        order = (engine_args, [asdict(prompt) for prompt in prompts], sampling, str(result))
        process = context.Process(target=_serve, args=order)
        process.start()
        while process.is_alive() and not result.exists():
            process.join(0.2)
        end_process(process, EXIT_S)
        if not result.exists():
            raise ValueError(
                f"the engine's process ended with status {process.exitcode} before it answered; "
                "its own messages are above"
            )
        content = json.loads(result.read_text())
    if "error" in content:
        raise ValueError(f"vLLM failed: {content['error']}")
    answers = tuple(
        ServedAnswer(**{k: tuple(v) if isinstance(v, list) else v for k, v in answer.items()})
        for answer in content["answers"]
    )
    return ServedRun(answers, tuple(map(tuple, content["paths"])))


def _serve(
    engine_args: dict[str, Any], prompts: list[dict[str, Any]], sampling: dict[str, Any], path: str
) -> None:
    try:
        content = _run_engine(engine_args, [Prompt(**prompt) for prompt in prompts], sampling)
    except Exception as error:
        traceback.print_exc()
        content = {"error": f"{type(error).__name__}: {error}"}
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content))
    part.rename(path)


def _run_engine(
    engine_args: dict[str, Any], prompts: list[Prompt], sampling: dict[str, Any]
) -> dict[str, Any]:
    from vllm import LLM

    text = any(prompt.token_ids is None for prompt in prompts)
    speculates = "speculative_config" in engine_args
    metrics = {"per_request_spec_decode_metrics": "detailed"} if speculates else {}
    llm = LLM(**engine_args, skip_tokenizer_init=not text, **metrics)
    try:
        chat = _chat_format(llm) if text else None
        return _answer_all(llm, prompts, sampling, chat, speculates)
    finally:
        # The engine core would outlive this process, which waits for it at its end.
        llm.llm_engine.engine_core.shutdown()


def _answer_all(
    llm: Any, prompts: list[Prompt], sampling: dict[str, Any], chat: Any, speculates: bool
) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(**sampling, detokenize=False)
    history: list[list[dict[str, str]]] = [[] for _ in prompts]
    answers: list[dict[str, Any]] = []
    for turn in range(max(max(1, len(prompt.turns)) for prompt in prompts)):
        active = [i for i, p in enumerate(prompts) if turn < max(1, len(p.turns))]
        ids = [_prompt_ids(prompts[i], turn, history[i], chat) for i in active]
        requests = [{"prompt_token_ids": list(row)} for row in ids]
        outputs = llm.generate(requests, params)
        for i, row, output in zip(active, ids, outputs, strict=True):
            completion = output.outputs[0]
            answer = ServedAnswer(
                i, prompts[i].category, tuple(row), tuple(completion.token_ids),
                tuple(completion.spec_decode_metrics.per_step_accepted) if speculates else (),
            )  # fmt: skip
            answers.append(asdict(answer))
            if chat is not None:
                reply = chat.decode(list(completion.token_ids))
                history[i].append({"role": "assistant", "content": reply})
    speculative = llm.llm_engine.vllm_config.speculative_config
    return {"answers": answers, "paths": speculative.tree_paths if speculates else ()}


def _chat_format(llm: Any) -> Any:
    from vllm_medusa.training.chat_format import ChatFormat

    return ChatFormat(llm.get_tokenizer())


def _prompt_ids(
    prompt: Prompt, turn: int, history: list[dict[str, str]], chat: Any
) -> Sequence[int]:
    if prompt.token_ids is not None:
        return prompt.token_ids
    history.append({"role": "user", "content": prompt.turns[turn]})
    return chat.answer_prompt(history)
