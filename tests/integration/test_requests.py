"""What a request may ask of vLLM, beside a token tree: the tokens of plain vLLM.

Pairs of engines, with Medusa and without, serve the same batches in one process: one pair
for histories and options, one with a custom logits processor, one for each grammar backend.
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

from vllm_medusa.config import DEFAULT_LOOKUP

pytestmark = pytest.mark.vllm

MAX_TOKENS = 48
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
LETTERS = "abcdefghijkl"
BAD_WORDS = [
    {"bad_words": ["A", "BC", "DEF"]},
    {
        "bad_words": [a + b + c for a in LETTERS for b in LETTERS for c in "afk"],
        "allowed_token_ids": [tiny_tokenizer.CHARACTERS.index(c) + 4 for c in LETTERS],
    },
]
MANY_WORDS = {"VLLM_MAX_NUM_BAD_WORDS": "512", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "2048"}
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
CONSTRAINED = {
    name: [{"structured_outputs": constraint, "ignore_eos": False}]
    for name, constraint in CONSTRAINTS.items()
} | {
    # What follows the end of a grammar is free.
    "after the end": [{"structured_outputs": CONSTRAINTS["choice"]}],
    "beside free requests": [{}, *({"structured_outputs": c} for c in CONSTRAINTS.values())],
}
VALID = {
    "JSON schema": lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None,
    "regex": lambda text: re.fullmatch(CONSTRAINTS["regex"]["regex"], text),
    "choice": lambda text: text in CONSTRAINTS["choice"]["choice"],
    # Python reads no number that begins with 0.
    "grammar": lambda text: isinstance(eval(re.sub(r"\b0+(?=[0-9])", "", text)), int),
}
BACKENDS = ("xgrammar", "guidance")
BUDGETED = [{"extra_args": {"medusa_nodes": nodes}} for nodes in (0, 1, 5, 63)] + [{}]
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
BESIDE = [*NO_REPEAT, {}, PENALTIES[0]]
GROUPS = {
    "penalties": PENALTIES,
    "bad words": BAD_WORDS,
    "thinking budget": BUDGETS,
    "all together": [{**PENALTIES[0], **BAD_WORDS[1], **BUDGETS[2]}, {}],
    "logprobs": LOGPROBS,
    "free": [{}],
}

# Five of each: once greedy, once seeded; vLLM takes n > 1 with a temperature only.
END = {"ignore_eos": False}
WARM = {"temperature": 0.7, "seed": 11}
SEVERAL = [
    {"n": 3, **WARM},
    {"n": 2, **WARM, "max_tokens": 9},
    {},
    {"n": 4, **WARM, "presence_penalty": 0.5},
    {"n": 2, **WARM, "top_k": 5, "stop": ["e"]},
]
STOPS = [
    {"stop": ["a", "Q"]},
    {"stop": ["e", "ab"], "include_stop_str_in_output": True},
    {"stop_token_ids": list(range(5, 96, 9)), "min_tokens": 12},
    {"min_tokens": 20, **END, "logit_bias": {"2": 8.0}},
    {"logit_bias": {"2": 4.0}, **END},
]
BIASES = [
    {"logit_bias": {"7": 3.0, "11": -100.0, "40": 1.5}},
    {"allowed_token_ids": list(range(3, 40))},
    {"allowed_token_ids": list(range(2, 96, 3)), "logit_bias": {"5": 2.0}, **END},
    {"logit_bias": {"50": 2.5}, "min_p": 0.2},
    {},
]
OPTIONS = {
    "n > 1": SEVERAL,
    "stop strings and tokens": STOPS,
    "logit bias and allowed tokens": BIASES,
    # Three heads: paths of one to four tokens.
    "max_tokens at every cut": [{"max_tokens": cut} for cut in (1, 2, 3, 4, 6)],
}


def batch(group: list[dict], count: int = 10) -> dict:
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


HISTORY_OF_CHOSEN = ("free", "penalties", "all together", "logprobs")
# What only Medusa's engine serves.
MORE = {
    "off": batch([{"extra_args": {"medusa_nodes": 0}}]),
    "budgets": batch(BUDGETED),
    "typical and exact": batch([TYPICAL, {}]),
    "wrong": {
        "prompts": [[5]],
        "sampling": [{"extra_args": {key: value}} for key, value in WRONG.items()],
        "refused": True,
    },
}


def job(engine: dict, batches: dict[str, dict], **options) -> dict:
    """A job of :mod:`engine_series`, with the names of its batches."""
    return {"engine": engine, "batches": list(batches.values()), "names": list(batches), **options}


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> dict[str, str]:
    """The tiny model with a tokenizer."""
    directory = tmp_path_factory.mktemp("tokenized") / "model"
    shutil.copytree(tiny["model"], directory)
    tiny_tokenizer.write_tokenizer(Path(directory))
    return {**tiny, "model": str(directory)}


def engine_jobs(model: dict[str, str]) -> dict[str, dict]:
    """Name -> job; with Medusa ``NAME, medusa``."""
    plain = {"model": model["model"], **ENGINE}
    medusa = {"method": "medusa", "model": model["heads"], "num_speculative_tokens": 40}
    jobs: dict[str, dict] = {}

    def pair(name: str, engine: dict, batches: dict, more: dict | None = None, **options) -> None:
        """An engine without Medusa, and one with it that serves a few batches more."""
        jobs[name] = job(plain | engine, batches, plain_v2=True, **options)
        # vLLM takes this option only with speculation.
        metrics = {"per_request_spec_decode_metrics": "summary"}
        engine = plain | engine | metrics | {"speculative_config": medusa}
        jobs[f"{name}, medusa"] = job(engine, {**batches, **(more or {})}, **options)

    history = {name: batch(group) for name, group in {**GROUPS, **OPTIONS}.items()}
    pair("history", {"reasoning_config": REASONING}, history, MORE, tokenizer=True)
    processors = {"logits_processors": ["repeat_processor:NoRepeatProcessor"]}
    pair("processor", processors, {"alone": batch(NO_REPEAT), "beside others": batch(BESIDE)})
    for backend in BACKENDS:
        config = {"structured_outputs_config": {"backend": backend}}
        grammars = {name: batch(group) for name, group in CONSTRAINED.items()}
        pair(backend, config, grammars, tokenizer=True)
    jobs["async, medusa"] = {**jobs["xgrammar, medusa"], "async": True}
    # Metrics count the depth of either kind of tree; a step of either may hold the other kind.
    chosen = jobs["xgrammar, medusa"]["engine"] | {"reasoning_config": REASONING}
    chosen = chosen | {"speculative_config": medusa | {"tree": "dynamic"}}
    batches = {name: MORE[name] for name in ("off", "budgets", "typical and exact")}
    batches |= {name: history[name] for name in HISTORY_OF_CHOSEN}
    batches |= {"beside free requests": grammars["beside free requests"]}
    jobs["chosen, medusa"] = job(chosen, batches, tokenizer=True)
    typical = plain | {"speculative_config": medusa | {"acceptance": "typical"}}
    exact = batch([{"extra_args": {"medusa_acceptance": "exact"}}])
    jobs["typical, medusa"] = job(typical, {"free": batch([{}]), "exact": exact})
    # Last: what is broken stays broken until the process ends.
    broken = jobs["history, medusa"]["engine"]
    groups = {name: history[name] for name in GROUPS}
    jobs["broken, medusa"] = job(broken, groups, tokenizer=True, **{"break": "chains"})
    return jobs


@pytest.fixture(scope="module")
def results(model, run_series) -> dict[str, dict]:
    """Job -> its result, "requests" and "accepted" by name of the batch."""
    jobs = engine_jobs(model)
    found = run_series(jobs, env=MANY_WORDS)
    for name, result in found.items():
        assert "error" not in result, f"{name}: {result['error']}"
        result["requests"] = dict(zip(jobs[name]["names"], result["batches"], strict=True))
        result["accepted"] = dict(zip(jobs[name]["names"], result["accepted"], strict=True))
    return found


def tokens(result: dict, batch: str) -> list[list[int]]:
    """Output of each request of a batch."""
    return [request["token_ids"] for request in result["requests"][batch]]


def endings(result: dict, batch: str) -> list[list]:
    """All outputs of each request of a batch, and why each ended."""
    return [
        [(one["token_ids"], one["finish"], one["stop"]) for one in (request, *request["others"])]
        for request in result["requests"][batch]
    ]


def count(result: dict) -> dict[str, int]:
    """Tokens of each batch's output."""
    return {name: sum(map(len, tokens(result, name))) for name in result["requests"]}


@pytest.mark.parametrize("group", GROUPS)
def test_history_is_the_path(results, group):
    plain, medusa = results["history"], results["history, medusa"]
    assert tokens(medusa, group) == tokens(plain, group)
    assert medusa["accepted"][group] > LEAST_ACCEPTED * count(plain)[group]


@pytest.mark.parametrize("group", OPTIONS)
def test_options_of_a_request(results, group):
    expected, found = (endings(results[name], group) for name in ("history", "history, medusa"))
    assert found == expected
    assert results["history, medusa"]["accepted"][group] > 0
    if group != "max_tokens at every cut":
        assert [len(outputs) for outputs in found[:5]] == [p.get("n", 1) for p in OPTIONS[group]]
    if group == "stop strings and tokens":
        assert sum(outputs[0][1] == "stop" for outputs in found) > len(found) // 2


@pytest.mark.parametrize("name", ["alone", "beside others"])
def test_custom_logits_processors_see_chains(results, name):
    plain, medusa = results["processor"], results["processor, medusa"]
    assert tokens(medusa, name) == tokens(plain, name)
    assert medusa["accepted"][name] > LEAST_ACCEPTED * count(plain)[name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_grammar_follows_the_path(results, backend, constraint):
    plain, medusa = results[backend], results[f"{backend}, medusa"]
    assert tokens(medusa, constraint) == tokens(plain, constraint)
    # A choice may be over before a draft can be right.
    assert medusa["accepted"][constraint] > 0 or constraint == "choice"
    assert sum(medusa["accepted"].values()) > LEAST_ACCEPTED * sum(count(plain).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_constrained_output_is_valid(results, backend):
    finished = 0
    for constraint, holds in VALID.items():
        for request in results[f"{backend}, medusa"]["requests"][constraint]:
            if request["finish"] == "stop":
                finished += 1
                text = tiny_tokenizer.text(request["token_ids"])
                assert holds(text), text
    assert finished > 10


@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_async_scheduling_learns_drafts_before_the_masks(results, constraint):
    found, expected = results["async, medusa"], results["xgrammar, medusa"]
    assert found["scheduler"] == "MedusaAsyncScheduler"
    assert expected["scheduler"] == "MedusaScheduler"
    assert tokens(found, constraint) == tokens(expected, constraint)
    accepted = [result["accepted"][constraint] for result in (found, expected)]
    # Whether a request's first step has drafts depends on the schedule.
    assert accepted[0] > 0.5 * accepted[1]


@pytest.mark.parametrize("name", [*HISTORY_OF_CHOSEN, "beside free requests"])
def test_chosen_trees_beside_the_start_up_tree(results, name):
    plain = results["xgrammar" if name == "beside free requests" else "history"]
    chosen = results["chosen, medusa"]
    assert tokens(chosen, name) == tokens(plain, name)
    assert chosen["accepted"][name] > LEAST_ACCEPTED * count(plain)[name]


def test_chosen_trees_are_cut_and_accepted_by_the_request_s_own_rule(results):
    chosen, expected = results["chosen, medusa"], tokens(results["history"], "free")
    assert tokens(chosen, "off") == tokens(chosen, "budgets") == expected
    assert 0 == chosen["accepted"]["off"] < chosen["accepted"]["budgets"]
    assert chosen["accepted"]["budgets"] < chosen["accepted"]["free"]
    # Greedy requests are exact under either rule.
    greedy = len(expected) // 2
    assert tokens(chosen, "typical and exact")[:greedy] == expected[:greedy]
    assert tokens(chosen, "typical and exact") != expected
    for m in (request["metrics"] for request in chosen["requests"]["free"]):
        # As deep as the history may propose, which is deeper than there are heads.
        deepest, steps = m["num_spec_tokens"], m["num_spec_steps"]
        assert deepest == DEFAULT_LOOKUP
        assert m["num_accepted_draft_tokens"] <= m["num_draft_tokens"] <= deepest * steps


@pytest.mark.parametrize("name", ["off", "budgets"])
def test_a_request_s_own_options(results, name):
    medusa = results["history, medusa"]
    assert tokens(medusa, name) == tokens(results["history"], "free")
    if name == "off":
        assert medusa["accepted"]["off"] == 0
    else:
        assert 0 < medusa["accepted"]["budgets"] < medusa["accepted"]["free"]


def test_metrics_of_a_request_count_depth(results):
    medusa = results["history, medusa"]
    metrics = [request["metrics"] for request in medusa["requests"]["free"]]
    accepted = sum(m["num_accepted_draft_tokens"] for m in metrics)
    assert accepted == medusa["accepted"]["free"]
    for m in metrics:
        # As deep as what the history proposes, not as there are nodes.
        assert m["num_spec_tokens"] == 16 and len(m["acceptance_histogram"]) == 17
        assert m["num_accepted_draft_tokens"] <= m["num_draft_tokens"] <= 16 * m["num_spec_steps"]
    off = [request["metrics"] for request in medusa["requests"]["off"]]
    assert sum(m["num_accepted_draft_tokens"] for m in off) == 0


def test_logprobs_of_named_tokens(results):
    found, expected = (results[n]["requests"]["logprobs"] for n in ("history, medusa", "history"))
    for ours, plain in zip(found, expected, strict=True):
        assert ours["token_ids"] == plain["token_ids"]
        assert (ours["logprobs"] is None) == (plain["logprobs"] is None)
        for left, right in zip(ours["logprobs"] or [], plain["logprobs"] or [], strict=True):
            assert [(token, rank) for token, _, rank in left] == [(t, r) for t, _, r in right]
            for (_, x, _), (_, y, _) in zip(left, right, strict=True):
                assert abs(x - y) < LOGPROB_TOLERANCE


def test_typical_acceptance_beside_exact(results):
    """Greedy requests are exact under either rule, and so is a request that asks for it."""
    expected = tokens(results["history"], "free")
    greedy = len(expected) // 2
    mixed = tokens(results["history, medusa"], "typical and exact")
    # Every other request asks for it, from the first on.
    typical = range(greedy + greedy % 2, len(expected), 2)
    for index, (found, plain) in enumerate(zip(mixed, expected, strict=True)):
        assert found == plain or index in typical
    assert any(mixed[index] != expected[index] for index in typical)


def test_typical_acceptance_of_a_server(results):
    expected, server = tokens(results["history"], "free"), results["typical, medusa"]
    greedy = len(expected) // 2
    assert tokens(server, "free")[:greedy] == expected[:greedy]
    assert tokens(server, "free")[greedy:] != expected[greedy:]
    assert tokens(server, "exact") == expected
    assert server["accepted"]["free"] > server["accepted"]["exact"] > 0


@pytest.mark.parametrize("key", WRONG)
def test_wrong_options_are_refused_with_the_request(results, key):
    errors = [r["error"] for r in results["history, medusa"]["requests"]["wrong"]]
    error = errors[list(WRONG).index(key)]
    assert error.startswith("VLLMValidationError") and key in error and "\n" not in error


@pytest.mark.parametrize("group", ["penalties", "bad words", "thinking budget", "all together"])
def test_comparison_sees_rows_taken_for_a_chain(results, group):
    """Siblings counted as history: what vLLM's own reading of the rows would give."""
    assert tokens(results["broken, medusa"], group) != tokens(results["history"], group)
