"""Answers on disk: three formats, chats with their template, the journal of a stopped run."""

import json

import pytest
from test_distill import END, LetterTokenizer, ScriptedEngine

from vllm_medusa.training.answer_files import Answer, load_answers, write_answers
from vllm_medusa.training.chat_format import ChatFormat
from vllm_medusa.training.config import DistillConfig
from vllm_medusa.training.generate import Distiller
from vllm_medusa.training.journal import Journal
from vllm_medusa.training.prompts import TestQuestionGuard

ANSWERS = [
    Answer([{"role": "user", "content": "a"}], [5, 6], [7, END]),
    Answer([{"role": "user", "content": "b"}], [5], [8, 9, END], "sampled", False, ("more",)),
]


class CallableTokenizer(LetterTokenizer):
    """Also encodes with offsets, as fast tokenizers do; a blank line follows each end of turn."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        text = "".join(f"<{m['role']}>{m['content']}~\n" for m in messages)
        return text + "<assistant>" * add_generation_prompt

    def __call__(self, text, add_special_tokens, return_offsets_mapping):
        ids = self.encode(text, add_special_tokens)
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}


@pytest.mark.parametrize("suffix", [".safetensors", ".jsonl", ".parquet"])
def test_every_format_trains_the_same(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_answers(path, ANSWERS, {"counts": "{}"})
    found, skipped = load_answers([path, path])
    assert not skipped
    assert found.token_ids.tolist() == [5, 6, 7, END, 5, 8, 9, END] * 2
    assert found.answer_mask.tolist() == [0, 0, 1, 1, 0, 1, 1, 1] * 2
    assert found.offsets.tolist() == [0, 4, 8, 12, 16]


def test_chats_are_masked_to_what_the_assistant_wrote(tmp_path):
    said = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in said]
    path = tmp_path / "a.jsonl"
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps({"messages": messages}) + "\n"
                    + json.dumps({"conversations": sharegpt}) + "\n"
                    + json.dumps({"messages": messages[:1]}) + "\n")  # fmt: skip
    found, skipped = load_answers([path], CallableTokenizer())
    assert skipped == {"no assistant turn": 1}
    spoken = [
        "".join(chr(t) if t != END else "~" for t in found.tokens(i)[found.mask(i)])
        for i in range(2)
    ]
    # With the token that ends the turn, without the line break that the template adds.
    assert spoken == ["yes~no~", "yes~"]


def test_template_that_rewrites_earlier_turns_is_counted(tmp_path):
    class Forgetful(CallableTokenizer):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            last = super().apply_chat_template(messages[-1:], tokenize, add_generation_prompt)
            return f"{len(messages)}{last}"

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert ChatFormat(Forgetful()).render_answers(messages) is None
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(ValueError, match=r"no answer .the chat template cannot render it: 1"):
        load_answers([path], Forgetful())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("3", "expected an object"),
        ('{"text": "x"}', r"found the keys \['text'\]"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn: 1"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "expected a tokenizer"),
    ],
)
def test_bad_data_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_answers([path])
    with pytest.raises(ValueError, match=r"suffix '\.csv'"):
        write_answers(tmp_path / "a.csv", ANSWERS, {})


def test_journal_survives_a_kill_and_knows_its_settings(tmp_path):
    journal = Journal(tmp_path / "j", {"seed": 0, "lists": (1, 2)})
    for answer in ANSWERS:
        journal.append(answer)
    journal.close()
    with (tmp_path / "j").open("a") as file:
        file.write('{"messages": [{"ro')
    again = Journal(tmp_path / "j", {"seed": 0, "lists": (1, 2)})
    assert again.answers == ANSWERS
    again.append(ANSWERS[0])
    again.close()
    assert Journal(tmp_path / "j", {"seed": 0}).answers == [*ANSWERS, ANSWERS[0]]
    with pytest.raises(ValueError, match="is of a run with seed 0; expected 1"):
        Journal(tmp_path / "j", {"seed": 1})


class StoppingEngine(ScriptedEngine):
    """Stops, as a killed run would, after so many steps."""

    steps_left = 10**6

    def step(self):
        if self.steps_left == 0:
            raise KeyboardInterrupt
        self.steps_left -= 1
        yield from super().step()


def _distil(journal, prompts, steps=10**6, **changes):
    pytest.importorskip("vllm", reason="requests carry vLLM's SamplingParams")
    engine = StoppingEngine(lambda text: f"re {text[-20:-11]}~")
    engine.steps_left = steps
    config = DistillConfig(
        **{"max_conversations": 99, "max_num_seqs": 2, "sampled_share": 0.0,
           "second_turn_share": 0.0, "self_prompt_share": 0.0, **changes}
    )  # fmt: skip
    chat = ChatFormat(LetterTokenizer())
    distiller = Distiller(engine, chat, config, TestQuestionGuard([]), journal)
    return distiller, distiller.run(iter(prompts)), engine


def test_a_resumed_run_asks_only_what_is_missing(tmp_path):
    prompts = [[f"question {i}", f"further {i}", f"last {i}"] for i in range(5)]
    whole = {a.messages[-1]["content"]: a for a in _distil(None, prompts)[0].answers}
    assert len(whole) == 15
    with pytest.raises(KeyboardInterrupt):
        _distil(Journal(tmp_path / "j", {}), prompts, steps=3)
    journal = Journal(tmp_path / "j", {})
    before = len(journal.answers)
    assert 0 < before < 15
    distiller, data, engine = _distil(journal, prompts)
    assert len(data) == 15
    assert len(engine.requests) == 15 - before
    assert {a.messages[-1]["content"]: a for a in distiller.answers} == whole
    # Complete: nothing is asked again.
    assert _distil(Journal(tmp_path / "j", {}), prompts)[2].requests == []
