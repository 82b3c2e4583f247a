"""Distiller: lets a chat model talk to itself through vLLM and keeps its own tokens as labels."""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_medusa.training.answer_files import Answer
from vllm_medusa.training.chat_format import ChatFormat, Message
from vllm_medusa.training.config import DistillConfig
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.journal import Journal
from vllm_medusa.training.progress import progress_bar
from vllm_medusa.training.prompts import TestQuestionGuard, follow_up

# Dropped turns without a single answer after which a run gives up: a model that cannot play the
# user would keep it going for ever.
_HOPELESS_DROPS = 1000


@dataclass
class _Job:
    """One request in flight: the user's next turn, or an answer to keep."""

    kind: str  # "user", "greedy" or "sampled"
    turn: int  # 0 for the first turn
    messages: list[Message]
    prompt_ids: list[int]
    pending_turns: list[str] = field(default_factory=list)


class Distiller:
    """Feeds a vLLM engine with conversations and collects the answers.

    Parameters
    ----------
    engine : vllm.v1.engine.llm_engine.LLMEngine
        ``LLM(...).llm_engine``. Requests ask for final outputs without detokenisation, which
        keeps the host out of the way at a thousand sequences a step.
    chat : ChatFormat
    config : DistillConfig
    guard : TestQuestionGuard
        Drops user turns that repeat test questions.
    journal : Journal, optional
        Keeps every answer, and brings those of an earlier run.
    """

    def __init__(
        self,
        engine: Any,
        chat: ChatFormat,
        config: DistillConfig,
        guard: TestQuestionGuard,
        journal: Journal | None = None,
    ) -> None:
        self.engine, self.chat, self.config, self.guard = engine, chat, config, guard
        self.journal = journal
        self.answers: list[Answer] = list(journal.answers) if journal is not None else []
        # A resumed run must draw other prompts than those that it began with.
        self.rng = random.Random(f"{config.seed}-{len(self.answers)}" if self.answers
                                 else config.seed)  # fmt: skip
        self.jobs: dict[str, _Job] = {}
        self.counts = {"self_prompts": 0, "given_prompts": 0, "second_turns": 0, "dropped": 0}
        self._seen: set[str] = set()
        self._next_id = 0
        # first turns that an earlier run answered
        self._done = {
            a.messages[-1]["content"].lower() for a in self.answers if len(_users(a.messages)) == 1
        }

    def run(self, prompts: Iterable[Sequence[str]]) -> ConversationSet:
        """Generate until ``max_conversations`` answers, the last prompt or ``max_seconds``.

        Parameters
        ----------
        prompts : iterable of sequences of str
            User turns of the conversations that are not self-prompted.

        Returns
        -------
        ConversationSet
            One entry per answer: its whole prompt, then the marked answer.
        """
        config, source = self.config, iter(prompts)
        started = time.monotonic()
        with progress_bar("answers", config.max_conversations) as advance:
            advance(len(self.answers))
            self._continue_earlier()
            while len(self.answers) < config.max_conversations:
                expired = (
                    config.max_seconds is not None
                    and time.monotonic() - started > config.max_seconds
                )
                if expired or not self._refill(source):
                    break
                before = len(self.answers)
                for output in self.engine.step():
                    if output.finished:
                        self._finish(self.jobs.pop(output.request_id), output.outputs[0])
                advance(len(self.answers) - before)
        if self.jobs:
            self.engine.abort_request(list(self.jobs))
            self.jobs.clear()
        kept = self.answers[: config.max_conversations]
        return ConversationSet.from_pairs((a.prompt_token_ids, a.answer_token_ids) for a in kept)

    def _continue_earlier(self) -> None:
        """Ask for the given turns that an earlier run was stopped before."""
        asked = {_key(a.messages) for a in self.answers}
        for answer in list(self.answers):
            if not (answer.pending_turns and answer.finished and answer.kind == "greedy"):
                continue
            reply = self.chat.decode(answer.answer_token_ids)
            messages = [*answer.messages, {"role": "assistant", "content": reply}]
            following = {"role": "user", "content": answer.pending_turns[0]}
            if _key([*messages, following]) not in asked:
                turn = len(_users(messages))
                self._ask_answer(turn, messages, list(answer.pending_turns))

    def _refill(self, source: Iterator[Sequence[str]]) -> bool:
        """Keep a quarter more requests queued than run at once; False when nothing is left."""
        wanted = self.config.max_num_seqs * 5 // 4
        missing = self.config.max_conversations - len(self.answers)
        if not self.answers and self.counts["dropped"] >= _HOPELESS_DROPS:
            raise ValueError(
                f"{self.counts['dropped']} user turns were dropped and none was kept; expected "
                "finished, new turns. Lower self_prompt_share and give prompt files"
            )
        while len(self.jobs) < min(wanted, missing):
            if self.rng.random() < self.config.self_prompt_share:
                self._ask_user(0, [])
                continue
            turns = next(source, None)
            if turns is None:
                if self.config.self_prompt_share == 0:
                    break
                continue
            if turns[0].lower() in self._done:
                continue
            self.counts["given_prompts"] += 1
            self._ask_answer(0, [], list(turns))
        return bool(self.jobs)

    def _ask_user(self, turn: int, messages: list[Message]) -> None:
        self._submit(_Job("user", turn, messages, self.chat.user_prompt(messages)))

    def _ask_answer(self, turn: int, messages: list[Message], turns: list[str]) -> None:
        text = turns[0]
        key = text.lower() if turn == 0 else ""
        if key in self._seen or key in self._done or self.guard.is_copy(text):
            self.counts["dropped"] += 1
            return
        if key:
            self._seen.add(key)
        messages = [*messages, {"role": "user", "content": text}]
        prompt_ids = self.chat.answer_prompt(messages)
        if len(prompt_ids) + self.config.max_answer_tokens > self.config.max_model_len:
            self.counts["dropped"] += 1
            return
        self._submit(_Job("greedy", turn, messages, prompt_ids, turns[1:]))
        if self.rng.random() < self.config.sampled_share:
            self._submit(_Job("sampled", turn, messages, prompt_ids))

    def _submit(self, job: _Job) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config = self.config
        temperature = {"user": config.user_temperature, "sampled": config.answer_temperature}
        limit = config.max_user_tokens if job.kind == "user" else config.max_answer_tokens
        params = SamplingParams(
            temperature=temperature.get(job.kind, 0.0), max_tokens=limit, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        request_id = f"{config.seed}-{self._next_id}"
        self._next_id += 1
        self.jobs[request_id] = job
        self.engine.add_request(request_id, {"prompt_token_ids": job.prompt_ids}, params)

    def _finish(self, job: _Job, completion: Any) -> None:
        ids = list(completion.token_ids)
        stopped = completion.finish_reason == "stop"
        if job.kind == "user":
            self._take_user_turn(job, ids, stopped)
            return
        answer = Answer(
            job.messages, job.prompt_ids, ids, job.kind, stopped, tuple(job.pending_turns)
        )
        self.answers.append(answer)
        if self.journal is not None:
            self.journal.append(answer)
        if job.kind == "greedy" and stopped:
            self._continue_conversation(job, ids)

    def _take_user_turn(self, job: _Job, ids: list[int], stopped: bool) -> None:
        text = self.chat.decode(ids)
        # A turn without an end is usually a loop; what follows it would be no conversation.
        if not stopped or len(text) < self.config.min_user_chars:
            self.counts["dropped"] += 1
            return
        self.counts["self_prompts"] += job.turn == 0
        self._ask_answer(job.turn, job.messages, [text])

    def _continue_conversation(self, job: _Job, ids: list[int]) -> None:
        messages = [*job.messages, {"role": "assistant", "content": self.chat.decode(ids)}]
        if job.pending_turns:
            self._ask_answer(job.turn + 1, messages, job.pending_turns)
        elif job.turn == 0 and self.rng.random() < self.config.second_turn_share:
            self.counts["second_turns"] += 1
            if self.rng.random() < self.config.self_follow_up_share:
                self._ask_user(1, messages)
            else:
                self._ask_answer(1, messages, [follow_up(self.rng)])


def _users(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "user"]


def _key(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["content"] for message in messages)


def greedy_answers(
    llm: Any, chat: ChatFormat, conversations: Sequence[Sequence[str]], max_tokens: int
) -> tuple[ConversationSet, list[int]]:
    """Greedy answers to every turn, each turn seeing the model's own earlier answers.

    Unlike :class:`Distiller`, every turn is answered, also after an answer that ran into
    ``max_tokens``; used for test questions.

    Returns
    -------
    ConversationSet
        One entry per answered turn; the earlier turns are part of its prompt.
    list[int]
        Index of the conversation that each entry belongs to.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False)
    history: list[list[Message]] = [[] for _ in conversations]
    pairs: list[tuple[list[int], list[int]]] = []
    owners: list[int] = []
    for turn in range(max(map(len, conversations), default=0)):
        active = [i for i, turns in enumerate(conversations) if turn < len(turns)]
        for i in active:
            history[i].append({"role": "user", "content": conversations[i][turn]})
        prompts = [{"prompt_token_ids": chat.answer_prompt(history[i])} for i in active]
        for i, prompt, output in zip(active, prompts, llm.generate(prompts, params), strict=True):
            ids = list(output.outputs[0].token_ids)
            pairs.append((prompt["prompt_token_ids"], ids))
            owners.append(i)
            history[i].append({"role": "assistant", "content": chat.decode(ids)})
    return ConversationSet.from_pairs(pairs), owners
