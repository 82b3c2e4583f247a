"""The HTTP server with Medusa beside the same server without it: answers, errors, leavers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import http_server
import jsonschema
import pytest
import tiny_tokenizer
from http_server import NAME, Server, all_at_once

from vllm_medusa.config import MAX_TREE_NODES

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ARGUMENTS = [
    "--dtype=float32", "--max-model-len=1024", "--enforce-eager", "--seed=0", "--max-num-seqs=8",
    "--max-num-batched-tokens=256", "--block-size=32", "--num-gpu-blocks-override=120",
    "--enable-auto-tool-choice", "--tool-call-parser=hermes",
    "--worker-extension-cls=state_probe.StateProbe",
    # Without it a grammar lets a random model write spaces for ever.
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
]  # fmt: skip
# Routes that look into the engine, whose core then lives with its worker.
ENV = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["small", "smart", "large"]},
        "sizes": {
            "type": "array",
            "items": {"enum": [1, 12, 123]},
            "minItems": 2,
            "maxItems": 4,
        },
    },
    "required": ["kind", "sizes"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    # Without `strict` vLLM only asks for JSON.
    "function": {"name": "pick", "parameters": SCHEMA, "strict": True},
}
IDLE_S = 30


@pytest.fixture(scope="module")
def servers(tiny_spelled, tmp_path_factory) -> Iterator[dict[str, Server]]:
    """``plain`` and ``medusa``, side by side."""
    folder = tmp_path_factory.mktemp("servers")
    heads = {"method": "medusa", "model": tiny_spelled["heads"], "num_speculative_tokens": 20}
    medusa = [f"--speculative-config={json.dumps(heads)}"]
    medusa += ["--per-request-spec-decode-metrics=summary"]
    started = {
        name: Server(folder, name, [tiny_spelled["model"], *ARGUMENTS, *more], ENV)
        for name, more in (("plain", []), ("medusa", medusa))
    }
    try:
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.stop()


def mixed_bodies(count: int) -> list[tuple[str, dict]]:
    """Requests of both kinds, of different prompts and lengths, cut by different limits."""
    asked = []
    for index in range(count):
        words = " ".join(tiny_tokenizer.CHARACTERS[(7 * index + i) % 90] * 3 for i in range(index))
        body = {"max_tokens": 40 + 13 * index, "ignore_eos": index % 3 != 0}
        if index % 2:
            body |= {"messages": [{"role": "user", "content": f"Tell me {words}"}]}
            asked.append((CHAT, body))
        else:
            asked.append((COMPLETIONS, body | {"prompt": f"Once {words}"}))
    return asked


def metric(server: Server, name: str) -> float:
    """Sum of a metric's samples."""
    lines = server.request("GET", "/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}"))


def quiet_state(server: Server) -> dict:
    """What the engine holds once it is idle."""
    deadline = time.monotonic() + IDLE_S
    while True:
        # Every request id begins with the name of its route.
        body = {"method": "request_state", "args": ["c"]}
        status, answer = server.request("POST", "/collective_rpc", body)
        assert status == 200, answer
        (state,) = answer["results"]
        # Other strings begin with the letter too, and vLLM remembers its last step's drafts.
        held = [text for text in state["held"] if ": cmpl-" in text or ": chatcmpl-" in text]
        held = [text for text in held if ".DraftTokensHandler." not in text]
        if (state["idle"] and not held) or time.monotonic() > deadline:
            return state | {"held": held}
        time.sleep(0.2)


def test_several_clients_stream_what_plain_vllm_says(servers):
    asked = mixed_bodies(8)
    before = metric(servers["medusa"], "spec_decode_num_accepted_tokens_total")
    found, expected = (all_at_once(servers[name], asked) for name in ("medusa", "plain"))
    assert found == expected
    assert all(end == "done" and text for text, end in found)
    assert metric(servers["medusa"], "spec_decode_num_accepted_tokens_total") > before


@pytest.mark.parametrize("choice", ["named", "required"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tool_call_follows_its_grammar(servers, choice, streamed):
    named = {"type": "function", "function": {"name": "pick"}}
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Pick one for me"}],
        "tools": [TOOL],
        "tool_choice": named if choice == "named" else "required",
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "temperature": 0,
    }
    calls = {}
    for name, server in servers.items():
        if streamed:
            chunks = list(server.stream(CHAT, body))
            assert chunks[-1] == {"done": True}
            deltas = [c["delta"] for chunk in chunks for c in chunk.get("choices", [])]
            functions = [d["tool_calls"][0]["function"] for d in deltas if d.get("tool_calls")]
        else:
            status, answer = server.request("POST", CHAT, body)
            assert status == 200, answer
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            functions = [call["function"]]
        calls[name] = tuple(
            "".join(function.get(part) or "" for function in functions)
            for part in ("name", "arguments")
        )
    assert calls["medusa"] == calls["plain"]
    called, arguments = calls["medusa"]
    assert called == "pick"
    jsonschema.validate(json.loads(arguments), SCHEMA)


def accepted_drafts(answer: dict) -> int:
    """Drafts accepted for this answer, by its own statistics."""
    statistics = answer["metrics"]["speculative_decoding"]
    histogram = statistics["acceptance_histogram"]
    accepted = sum(tokens * steps for tokens, steps in enumerate(histogram))
    assert accepted == statistics["num_accepted_draft_tokens"]
    # Tokens of depth, not nodes: a tree has 20 nodes and as many levels as the history proposes.
    assert statistics["num_spec_tokens"] == 16
    assert statistics["num_draft_tokens"] <= 16 * statistics["num_spec_steps"]
    return accepted


def with_and_without_trees(server: Server, path: str, body: dict) -> list[dict]:
    """Two answers of one server, which draws the same for both."""
    body = {"model": NAME, "seed": 7, **body}
    answers = []
    for options in ({}, {"vllm_xargs": {"medusa_nodes": 0}}):
        status, answer = server.request("POST", path, body | options)
        assert status == 200, answer
        answers.append(answer)
    return answers


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_statistics_of_a_response(servers, temperature):
    body = {"prompt": "what is a tree?", "max_tokens": 64, "temperature": temperature}
    body["ignore_eos"] = True
    answer, plain = with_and_without_trees(servers["medusa"], COMPLETIONS, body)
    assert answer["choices"][0]["text"] == plain["choices"][0]["text"]
    steps = answer["metrics"]["speculative_decoding"]["num_spec_steps"]
    # Each step returns its accepted drafts and one token more; the last may be cut short.
    assert 63 <= 1 + accepted_drafts(answer) + steps <= 64 + 3
    assert accepted_drafts(answer) > 0 == accepted_drafts(plain)


# A call as the parser of Hermes models looks for it, with free characters inside.
CALL = r'<tool_call>\{"name": "pick", "arguments": \{"kind": "[a-z]{4,9}"\}\}</tool_call>'


def test_a_parser_finds_the_call_in_text(servers):
    """It is handed several tokens at once."""
    loose = {"type": "function", "function": {"name": "pick", "parameters": SCHEMA}}
    body = {"messages": [{"role": "user", "content": "choose one"}], "tools": [loose]}
    body |= {"tool_choice": "auto", "structured_outputs": {"regex": CALL}, "max_tokens": 200}
    answer, plain = with_and_without_trees(servers["medusa"], CHAT, body | {"temperature": 0.6})
    (call,), (expected,) = (a["choices"][0]["message"]["tool_calls"] for a in (answer, plain))
    assert call["function"] == expected["function"]
    assert call["function"]["name"] == "pick"
    assert list(json.loads(call["function"]["arguments"])) == ["kind"]
    assert accepted_drafts(answer) > 0 == accepted_drafts(plain)
    chunks = servers["medusa"].stream(CHAT, body | {"temperature": 0.6, "seed": 7})
    choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
    parts = [p["function"] for c in choices for p in c["delta"].get("tool_calls") or ()]
    streamed = {key: "".join(p.get(key) or "" for p in parts) for key in ("name", "arguments")}
    assert json.loads(streamed["arguments"]) == json.loads(call["function"]["arguments"])
    assert streamed["name"] == "pick"


# What vLLM itself finds wrong when a request reaches its engine.
UNGRAMMATICAL = {"structured_outputs": {"regex": "(("}}
# vllm_xargs -> words of the sentence
WRONG = {
    "negative budget": ({"medusa_nodes": -1}, "medusa_nodes=-1", f"to {MAX_TREE_NODES}"),
    "budget as text": ({"medusa_nodes": "many"}, "medusa_nodes='many'", "integer"),
    "unknown key": ({"medusa_node": 3}, "'medusa_node'", "medusa_nodes"),
    "unknown rule": ({"medusa_acceptance": "sloppy"}, "sloppy", "typical"),
    "parameter of another rule": (
        {"medusa_typical_epsilon": 0.1}, "medusa_typical_epsilon=0.1", "medusa_acceptance",
    ),
    "epsilon of 2": (
        {"medusa_acceptance": "typical", "medusa_typical_epsilon": 2.0}, "2.0", "epsilon",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
def test_wrong_options_are_a_bad_request(servers, path, case):
    options, *words = WRONG[case]
    body = {"model": NAME, "max_tokens": 4, "vllm_xargs": options}
    body |= {"prompt": "a"} if path == COMPLETIONS else {
        "messages": [{"role": "user", "content": "a"}]
    }  # fmt: skip
    status, answer = servers["medusa"].request("POST", path, body)
    assert status == 400
    check_error(answer, words)
    # Plain vLLM has nothing to say on other people's keys.
    assert servers["plain"].request("POST", path, body)[0] == 200
    # A stream has begun by the time vLLM checks parameters, its own ones too.
    streamed = list(servers["medusa"].stream(path, body))
    check_error(streamed[0], words)
    own = list(servers["plain"].stream(path, body | UNGRAMMATICAL))
    assert [sorted(chunk) for chunk in streamed] == [sorted(chunk) for chunk in own]
    assert streamed[0]["error"]["code"] == own[0]["error"]["code"] == 400


def check_error(answer: dict, words: list[str]) -> None:
    """One sentence that names what is wrong."""
    message = answer["error"]["message"]
    assert all(word in message for word in words) and "\n" not in message, answer
    assert answer["error"]["type"] == "BadRequestError"


def test_right_options_change_the_speed_only(servers):
    body = {"prompt": "Once", "max_tokens": 60, "ignore_eos": True}
    plain = http_server.read_to_the_end(servers["plain"], COMPLETIONS, body)
    accepted = []
    for nodes in (0, 3, 20):
        before = metric(servers["medusa"], "spec_decode_num_accepted_tokens_total")
        xargs = {"vllm_xargs": {"medusa_nodes": nodes}}
        assert http_server.read_to_the_end(servers["medusa"], COMPLETIONS, body | xargs) == plain
        after = metric(servers["medusa"], "spec_decode_num_accepted_tokens_total")
        accepted.append(after - before)
    assert accepted[0] == 0 < accepted[1] <= accepted[2]


@pytest.mark.parametrize("name", ["medusa", "plain"])
def test_clients_that_hang_up_leave_nothing(servers, name):
    """More clients than slots, so that some leave from the queue; streamed and whole answers."""
    server = servers[name]
    before = quiet_state(server)
    finished = metric(server, "request_success_total")

    def leave(index: int) -> None:
        path, body = mixed_bodies(index + 1)[index]
        body |= {"max_tokens": 900, "ignore_eos": True}
        if index % 3:
            stream = server.stream(path, body)
            for _ in range(index % 5 + 1):
                assert "error" not in next(stream)
            stream.close()
        else:
            connection = server.connect()
            headers = {"Content-Type": "application/json"}
            content = json.dumps({"model": NAME, "temperature": 0, **body})
            connection.request("POST", path, content, headers)
            time.sleep(0.3)
            connection.close()

    with ThreadPoolExecutor(14) as pool:
        list(pool.map(leave, range(14)))
    state = quiet_state(server)
    assert state["idle"]
    # Slots keep their last request's options until the next one takes them.
    options = ("simple_slots", "chained_slots", "typical_slots")
    assert state == before | {name: state[name] for name in options if name in state}
    assert state["held"] == [] and state["requests"] == state["runner_requests"] == 0
    # All of them really left before their answers were over.
    assert metric(server, "request_success_total") == finished
    assert all_at_once(server, mixed_bodies(2)) == all_at_once(servers["plain"], mixed_bodies(2))
