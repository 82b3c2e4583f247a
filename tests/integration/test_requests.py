"""What a request may ask of vLLM, beside a token tree: the tokens of plain vLLM.

One engine with Medusa and one without serve all groups of requests, in one process; the
engines with a custom logits processor are another pair.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
import tiny_tokenizer
import traffic

pytestmark = pytest.mark.vllm

MAX_TOKENS = 64
# Drafts accepted per token of output: about 0.2 are, with heads fitted to free output.
LEAST_ACCEPTED = 0.02
ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "seed": 0,
    "max_num_seqs": 8,
    # Small enough that prompts arrive in chunks.
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "num_gpu_blocks_override": 100,
}
# Forced to end with three tokens, so that the end is forced inside trees.
REASONING = {"reasoning_start_str": "#", "reasoning_end_str": ";-)"}
START = tiny_tokenizer.CHARACTERS.index("#") + 4

PENALTIES = [
    {"repetition_penalty": 1.1},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"frequency_penalty": -0.2, "repetition_penalty": 1.05},
]
# Words of three tokens look back over two rows; few letters so that words are met.
LETTERS = "abcdefghijklmnop"
BAD_WORDS = [
    {"bad_words": ["A", "BC", "DEF"]},
    {
        "bad_words": [a + b + c for a in LETTERS for b in LETTERS for c in "afkp"],
        "allowed_token_ids": [tiny_tokenizer.CHARACTERS.index(c) + 4 for c in LETTERS],
    },
]
MANY_WORDS = {"VLLM_MAX_NUM_BAD_WORDS": "1024", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "4096"}
BUDGETS = [{"thinking_token_budget": budget} for budget in (0, 1, 7, 20)]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 5},
        "kind": {"enum": ["small", "smart", "large"]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}
UNTIL_EOS = {"ignore_eos": False}
EBNF = """
root ::= term (("+" | "-" | "*") term)*
term ::= number | "(" root ")"
number ::= [0-9] [0-9]*
"""
CONSTRAINTS = {
    "JSON schema": {"json": SCHEMA},
    "regex": {"regex": "([a-z]+,){3}[A-Z]{2,6}(:[0-9a-f]{4}){2}"},
    "choice": {"choice": ["yes, always", "yes, at times", "no", "never"]},
    "grammar": {"grammar": EBNF},
}
CONSTRAINED = [*CONSTRAINTS, "after the end", "beside free requests"]
VALID = {
    "JSON schema": lambda text: jsonschema.validate(json.loads(text), SCHEMA),
    "regex": lambda text: _holds(re.fullmatch(CONSTRAINTS["regex"]["regex"], text)),
    "choice": lambda text: _holds(text in CONSTRAINTS["choice"]["choice"]),
    "grammar": lambda text: _holds(isinstance(eval(_without_zeros(text)), int)),
}
BACKENDS = ("xgrammar", "guidance")
OPTIONS = [{"extra_args": {"medusa_nodes": nodes}} for nodes in (0, 1, 5, 63)] + [{}]
TYPICAL = {"extra_args": {"medusa_acceptance": "typical", "medusa_typical_epsilon": 0.3}}
# extra_args -> what the refusal names
WRONG = {
    "medusa_node": 3,
    "medusa_nodes": -1,
    "medusa_acceptance": "sloppy",
    "medusa_typical_epsilon": 0.1,
}
LOGPROBS = [{"logprobs": 2}, {"logprob_token_ids": [5, 40, 77]}, {}]
# float32 log-softmax of one vocabulary, summed in another order.
LOGPROB_TOLERANCE = 2e-4
NO_REPEAT = [{"extra_args": {"no_repeat": 1}}]
GROUPS = {
    "penalties": PENALTIES,
    "bad words": BAD_WORDS,
    "thinking budget": BUDGETS,
    "all together": [{**PENALTIES[0], **BAD_WORDS[1], **BUDGETS[2]}, {}],
}


def _holds(condition: object) -> None:
    assert condition


def _without_zeros(expression: str) -> str:
    """Python reads no number that begins with 0."""
    return re.sub(r"\b0+(?=[0-9])", "", expression)


def batch(group: list[dict], count: int = 12) -> dict:
    """Half of the requests greedy, half seeded, with the group's parameters in turn."""
    base = [
        *traffic.sampling("greedy", count // 2, MAX_TOKENS),
        *traffic.sampling("seeded", count - count // 2, MAX_TOKENS),
    ]
    prompts = traffic.prompts(count, seed=4, high=64)
    if "thinking_token_budget" in group[0]:
        prompts = [[*ids, START, ids[0]] for ids in prompts]
    sampling = [params | group[i % len(group)] for i, params in enumerate(base)]
    return {"prompts": prompts, "sampling": sampling}


def pair(name: str, job: dict, medusa: dict) -> dict[str, dict]:
    """The job without and with Medusa, the first on vLLM's own V2 runner."""
    engine = job["engine"] | {"speculative_config": medusa}
    return {name: {**job, "plain_v2": True}, f"{name}, medusa": {**job, "engine": engine}}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> dict[str, str]:
    """The tiny model with a tokenizer."""
    directory = tmp_path_factory.mktemp("tokenized") / "model"
    shutil.copytree(tiny["model"], directory)
    tiny_tokenizer.write_tokenizer(Path(directory))
    return {**tiny, "model": str(directory)}


@pytest.fixture(scope="module")
def results(model, run_series) -> dict[str, dict]:
    """``history`` and ``processor``, each alone and ``, medusa``."""
    medusa = {"method": "medusa", "model": model["heads"], "num_speculative_tokens": 40}
    engine = {"model": model["model"], **ENGINE}
    history = {
        "engine": engine | {"reasoning_config": REASONING},
        "batches": [batch(group) for group in GROUPS.values()],
        "tokenizer": True,
    }
    processor = {
        "engine": engine | {"logits_processors": ["repeat_processor:NoRepeatProcessor"]},
        "batches": [batch(NO_REPEAT), batch([*NO_REPEAT, {}, PENALTIES[0]])],
    }
    jobs = pair("history", history, medusa) | pair("processor", processor, medusa)
    for backend in BACKENDS:
        constrained = {
            "engine": engine | {"structured_outputs_config": {"backend": backend}},
            "batches": [
                *(batch([{"structured_outputs": c} | UNTIL_EOS]) for c in CONSTRAINTS.values()),
                # What follows the end of a grammar is free.
                batch([{"structured_outputs": CONSTRAINTS["choice"]}]),
                batch([{}, *({"structured_outputs": c} for c in CONSTRAINTS.values())]),
            ],
            "tokenizer": True,
        }
        jobs |= pair(backend, constrained, medusa)
    asynchronous = jobs["xgrammar, medusa"]
    asynchronous["batches"] = [*asynchronous["batches"], batch(OPTIONS), batch(PENALTIES)]
    jobs["async, medusa"] = asynchronous | {"async": True}
    jobs["typical, medusa"] = {
        "engine": engine | {"speculative_config": medusa | {"acceptance": "typical"}},
        "batches": [batch([{}]), batch([{"extra_args": {"medusa_acceptance": "exact"}}])],
    }
    jobs["options, medusa"] = {
        "engine": engine | {"speculative_config": medusa},
        "batches": [
            batch([{}]),
            batch([{"extra_args": {"medusa_nodes": 0}}]),
            batch(OPTIONS),
            batch([TYPICAL, {}]),
            batch(LOGPROBS),
            {
                "prompts": [[5]],
                "sampling": [{"extra_args": {key: value}} for key, value in WRONG.items()],
                "refused": True,
            },
        ],
    }
    jobs["free"] = {
        "engine": engine,
        "batches": [batch([{}]), batch(LOGPROBS)],
        "plain_v2": True,
    }
    # Last: what is broken stays broken until the process ends.
    broken = jobs["history, medusa"] | {"break": "chains"}
    return run_series(jobs | {"rows for chains, medusa": broken}, env=MANY_WORDS)


def token_ids(result: dict) -> list:
    assert "error" not in result, result["error"]
    return [[request["token_ids"] for request in batch] for batch in result["batches"]]


def count(batch: list) -> int:
    """Tokens of a batch's output."""
    return sum(map(len, batch))


@pytest.mark.parametrize("group", GROUPS)
def test_history_is_the_path(results, group):
    index = list(GROUPS).index(group)
    expected = token_ids(results["history"])[index]
    assert token_ids(results["history, medusa"])[index] == expected
    assert results["history, medusa"]["accepted"][index] > LEAST_ACCEPTED * count(expected)


def test_custom_logits_processors_see_chains(results):
    expected = token_ids(results["processor"])
    assert token_ids(results["processor, medusa"]) == expected
    assert min(results["processor, medusa"]["accepted"]) > LEAST_ACCEPTED * count(expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_grammar_follows_the_path(results, backend, constraint):
    index = CONSTRAINED.index(constraint)
    expected = token_ids(results[backend])[index]
    assert token_ids(results[f"{backend}, medusa"])[index] == expected
    accepted = results[f"{backend}, medusa"]["accepted"]
    # Some answers are over before a draft can be right.
    assert accepted[index] > 0 or constraint == "choice"
    assert sum(accepted) > LEAST_ACCEPTED * sum(map(count, token_ids(results[backend])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constrained_output_is_valid(results, backend):
    outputs = results[f"{backend}, medusa"]["batches"]
    finished = 0
    for constraint, requests in zip(CONSTRAINED[:-2], outputs, strict=False):
        for request in requests:
            text = tiny_tokenizer.text(request["token_ids"])
            if request["finish"] == "stop":
                finished += 1
                VALID[constraint](text)
    assert finished > 10


def test_async_scheduling_learns_drafts_before_the_masks(results):
    found, expected = results["async, medusa"], results["xgrammar, medusa"]
    assert found["scheduler"] == "MedusaAsyncScheduler"
    assert expected["scheduler"] == "MedusaScheduler"
    assert token_ids(found) == token_ids(expected)
    for one, other in zip(found["accepted"], expected["accepted"], strict=True):
        assert one > 0 and abs(one - other) <= max(20, 0.3 * other)


def test_a_request_s_own_options(results):
    expected = token_ids(results["free"])[0]
    found = token_ids(
        {**results["options, medusa"], "batches": results["options, medusa"]["batches"][:4]}
    )
    free, off, cut, _ = results["options, medusa"]["accepted"][:4]
    assert found[:3] == [expected] * 3
    assert off == 0
    assert 0 < cut < free


def test_logprobs_of_named_tokens(results):
    found = results["options, medusa"]["batches"][4]
    for ours, plain in zip(found, results["free"]["batches"][1], strict=True):
        assert ours["token_ids"] == plain["token_ids"]
        assert (ours["logprobs"] is None) == (plain["logprobs"] is None)
        for left, right in zip(ours["logprobs"] or [], plain["logprobs"] or [], strict=True):
            assert [(token, rank) for token, _, rank in left] == [(t, r) for t, _, r in right]
            for (_, x, _), (_, y, _) in zip(left, right, strict=True):
                assert abs(x - y) < LOGPROB_TOLERANCE


def test_typical_acceptance_beside_exact(results):
    """Greedy requests are exact under either rule, and so is a request that asks for it."""
    expected = token_ids(results["free"])[0]
    greedy = len(expected) // 2
    mixed = [r["token_ids"] for r in results["options, medusa"]["batches"][3]]
    assert mixed[:greedy] == expected[:greedy]
    # Every other request is typical, from the first on.
    assert mixed[greedy + 1 :: 2] == expected[greedy + 1 :: 2]
    assert mixed[greedy::2] != expected[greedy::2]

    typical, exact = token_ids(results["typical, medusa"])
    assert typical[:greedy] == expected[:greedy]
    assert typical[greedy:] != expected[greedy:]
    assert exact == expected
    accepted = results["typical, medusa"]["accepted"]
    assert accepted[0] > accepted[1] > 0


@pytest.mark.parametrize("key", WRONG)
def test_wrong_options_are_refused_with_the_request(results, key):
    errors = [r["error"] for r in results["options, medusa"]["batches"][5]]
    error = errors[list(WRONG).index(key)]
    assert error.startswith("VLLMValidationError") and key in error and "\n" not in error


def test_comparison_sees_rows_taken_for_a_chain(results):
    """Siblings counted as history: what vLLM's own reading of the rows would give."""
    pairs = zip(
        GROUPS,
        *(token_ids(results[name]) for name in ("rows for chains, medusa", "history")),
        strict=True,
    )
    assert {group for group, found, expected in pairs if found == expected} == set()
