"""Prompt files of every layout; empty, damaged and useless ones are named."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from vllm_medusa.training.prompt_files import Prompt, read_prompts

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "m"},
            {"role": "assistant", "content": "a"}, {"role": "user", "content": "n"}]  # fmt: skip
SHAREGPT = [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"},
            {"from": "human", "value": "i"}]  # fmt: skip


def _jsonl(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ("plain", ["plain"]),
        ({"prompt": "p"}, ["p"]),
        ({"turns": ["t", "u"]}, ["t", "u"]),
        ({"messages": MESSAGES}, ["m", "n"]),
        ({"id": "x", "conversations": SHAREGPT}, ["h", "i"]),
        ({"instruction": "do", "input": "", "output": "o"}, ["do"]),
        ({"instruction": "do", "input": "this", "output": "o"}, ["do\n\nthis"]),
        ({"id": "0", "data": ["q1", "a1", "q2", "a2"]}, ["q1", "q2"]),
        ({"turns": ["t", "  ", "u"]}, ["t"]),
    ],
    ids=["text", "prompt", "mt-bench", "messages", "sharegpt", "alpaca", "alpaca input",
         "ultrachat", "up to a blank turn"],
)  # fmt: skip
def test_layouts(tmp_path, row, turns):
    assert read_prompts(_jsonl(tmp_path / "a.jsonl", row)).turns == [turns]
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_prompts(tmp_path / "a.json").turns == [turns]


def test_text_file_and_parquet_and_ids(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    assert read_prompts(tmp_path / "a.txt").turns == [["first"], ["second"]]
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES[2:3]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_prompts(tmp_path / "a.parquet")
    assert found.turns == [["m", "n"]]
    assert found.skipped == {"no user turn": 1}
    path = _jsonl(tmp_path / "a.jsonl", {"prompt_token_ids": [5, 6], "category": "c"})
    assert read_prompts(path).prompts == [Prompt((), "c", (5, 6))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "", "is empty"),
        ("a.json", "{}", "holds a dict; expected a list"),
        ("a.jsonl", '"ok"\n{"prompt"', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", '{"question": 1}', r"a\.jsonl:1: expected a string or an object"),
        ("a.jsonl", '{"messages": []}', "holds 1 rows, none with a user turn"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "lacks 'content'"),
        ("a.jsonl", '{"prompt_token_ids": ["x"]}', "expected integers"),
        ("a.parquet", "no table", "is no Parquet file"),
        ("a.csv", "x", r"suffix '\.csv'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
