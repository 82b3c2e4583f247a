"""Prompts and the conversation loop, against an engine that answers from a script."""

import itertools
import re
from types import SimpleNamespace

import pytest

from vllm_medusa.training.chat_format import ChatFormat
from vllm_medusa.training.config import DistillConfig
from vllm_medusa.training.generate import Distiller, greedy_answers
from vllm_medusa.training.prompt_data import PATTERN_GROUPS, SLOTS
from vllm_medusa.training.prompts import TestQuestionGuard, template_prompts

pytest.importorskip("vllm", reason="requests carry vLLM's SamplingParams")

END = 0  # the end-of-turn token


class LetterTokenizer:
    """One token a letter; roles in angle brackets; ``~`` ends a turn."""

    chat_template = "letters"
    eos_token_id = END

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        assert not tokenize
        text = "".join(f"<{m['role']}>{m['content']}~" for m in messages)
        return text + "<assistant>" * add_generation_prompt

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [END if letter == "~" else ord(letter) for letter in text]

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(i) for i in ids if i != END)


class ScriptedEngine:
    """Answers every request after one step; ``reply(prompt) -> text``."""

    def __init__(self, reply):
        self.reply, self.waiting, self.requests, self.aborted = reply, [], [], []

    def add_request(self, request_id, prompt, params):
        text = LetterTokenizer().decode(prompt["prompt_token_ids"], True)
        self.requests.append((text, params))
        self.waiting.append((request_id, text, params))

    def step(self):
        done, self.waiting = self.waiting, []
        for request_id, text, params in done:
            reply = self.reply(text)
            ids = LetterTokenizer().encode(reply, False)[: params.max_tokens]
            reason = "stop" if ids[-1] == END else "length"
            output = SimpleNamespace(token_ids=ids, finish_reason=reason)
            yield SimpleNamespace(request_id=request_id, finished=True, outputs=[output])

    def abort_request(self, request_ids):
        self.aborted += request_ids


def _distill(reply, prompts=(), guard=(), **changes):
    settings = {"max_conversations": 12, "max_num_seqs": 4, "sampled_share": 0.0,
                "second_turn_share": 0.0, "self_prompt_share": 0.0}  # fmt: skip
    engine = ScriptedEngine(reply)
    distiller = Distiller(
        engine, ChatFormat(LetterTokenizer()), DistillConfig(**{**settings, **changes}),
        TestQuestionGuard(guard),
    )  # fmt: skip
    return distiller, distiller.run(prompts), engine


def _texts(data):
    tokenizer = LetterTokenizer()
    return [
        (tokenizer.decode(data.tokens(i)[~data.mask(i)], True),
         data.tokens(i)[data.mask(i)].tolist())
        for i in range(len(data))
    ]  # fmt: skip


def test_answers_keep_their_end_token_and_the_exact_prompt():
    _, data, _ = _distill(lambda text: "fine~", [["how are you"], ["who are you"]])
    assert _texts(data) == [
        ("<user>how are you<assistant>", [*map(ord, "fine"), END]),
        ("<user>who are you<assistant>", [*map(ord, "fine"), END]),
    ]


def test_given_turns_follow_the_models_own_answers():
    replies = itertools.count()
    _, data, engine = _distill(lambda text: f"reply{next(replies)}~", [["one one", "two two"]])
    assert [prompt for prompt, _ in _texts(data)] == [
        "<user>one one<assistant>",
        "<user>one one<assistant>reply0<user>two two<assistant>",
    ]
    assert all(params.temperature == 0 for _, params in engine.requests)


def test_self_prompts_are_sampled_as_user_and_answered_greedily():
    names = itertools.count()

    def reply(text):
        return "an answer~" if text.endswith("<assistant>") else f" question {next(names)} ~"

    distiller, data, engine = _distill(reply, self_prompt_share=1.0)
    assert len(data) == 12
    assert distiller.counts["self_prompts"] >= 12
    for prompt, _ in _texts(data):
        assert prompt.startswith("<user>question ")
    temperatures = {text[-6:]: params.temperature for text, params in engine.requests}
    assert temperatures["<user>"] == 1.0
    assert temperatures["stant>"] == 0.0


def test_unfinished_and_repeated_user_turns_are_dropped():
    new = [f"new {i} ok~" for i in range(99)]
    turns = iter(["endless " * 99, "same words~", "same words~", *new])

    def reply(text):
        return "yes~" if text.endswith("<assistant>") else next(turns)

    distiller, data, _ = _distill(reply, self_prompt_share=1.0, max_conversations=5)
    prompts = [prompt for prompt, _ in _texts(data)]
    assert len(set(prompts)) == 5
    assert distiller.counts["dropped"] >= 2


def test_a_model_that_cannot_play_the_user_ends_the_run():
    with pytest.raises(ValueError, match="user turns were dropped and none was kept"):
        _distill(lambda text: "~", self_prompt_share=1.0)


def test_test_questions_are_never_answered():
    question = "Please describe the nine tallest trees of our quiet village garden"
    _, data, _ = _distill(lambda text: "no~", [[question], ["another one"]], guard=[question])
    assert [prompt for prompt, _ in _texts(data)] == ["<user>another one<assistant>"]


def test_sampled_answers_come_beside_greedy_ones():
    _, data, engine = _distill(lambda text: "ok~", [["hello you"]], sampled_share=1.0)
    assert len(data) == 2
    assert sorted(params.temperature for _, params in engine.requests) == [0.0, 0.6]


def test_time_limit_aborts_what_is_in_flight():
    distiller, data, engine = _distill(
        lambda text: "ok~", [["hello you"]] * 3, max_seconds=1e-9
    )  # fmt: skip
    assert len(data) == 0
    assert not engine.requests or engine.aborted
    assert not distiller.jobs


def test_greedy_answers_go_on_after_a_cut_answer():
    llm = SimpleNamespace(generate=lambda prompts, params: [
        SimpleNamespace(outputs=[SimpleNamespace(token_ids=[ord("x")] * params.max_tokens)])
        for _ in prompts
    ])  # fmt: skip
    data, owners = greedy_answers(llm, ChatFormat(LetterTokenizer()), [["a", "b"], ["c"]], 3)
    assert owners == [0, 1, 0]
    assert _texts(data)[2][0] == "<user>a<assistant>xxx<user>b<assistant>"


def test_user_prompt_stops_where_the_user_speaks():
    chat = ChatFormat(LetterTokenizer())
    text = LetterTokenizer().decode(chat.user_prompt([{"role": "user", "content": "hi"}]), True)
    assert text == "<user>hi<user>"


def test_template_without_user_text_is_refused():
    tokenizer = LetterTokenizer()
    tokenizer.apply_chat_template = lambda *a, **k: "nothing"
    with pytest.raises(ValueError, match="the chat template changed the user's text"):
        ChatFormat(tokenizer).user_prompt([])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer has no chat_template"):
        ChatFormat(tokenizer)


def test_templates_repeat_by_seed_fill_every_slot_and_vary():
    first = list(itertools.islice(template_prompts(3), 2000))
    assert first == list(itertools.islice(template_prompts(3), 2000))
    assert not any("{" in prompt or "}" in prompt for prompt in first)
    # Short arithmetic repeats now and then; most of two thousand draws are new.
    assert len(set(first)) > 1600


def test_patterns_name_known_slots_only():
    known = set(SLOTS) | set("abcd")
    for _, patterns in PATTERN_GROUPS:
        for pattern in patterns:
            assert {kind for kind, _ in re.findall(r"\{([a-z_]+?)(\d?)\}", pattern)} <= known
    assert sum(share for share, _ in PATTERN_GROUPS) == pytest.approx(1.0)


def test_guard_knows_runs_of_words_and_short_questions():
    guard = TestQuestionGuard(["one two three four five", "Say hello!"], run_length=4)
    assert guard.is_copy("So: One, two three FOUR and more")
    assert guard.is_copy("say hello")
    assert not guard.is_copy("one two three and four five")
    assert not guard.is_copy("say hello to them")
