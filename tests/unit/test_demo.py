"""The demo's parts against small servers made here; no vLLM."""

import itertools
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from vllm_medusa.demo import acceptance, chat, demo, report, server
from vllm_medusa.demo.acceptance import Acceptance
from vllm_medusa.demo.chat import Answer
from vllm_medusa.demo.failure import StepError

METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 50.0
# HELP vllm:spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 40.0
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per draft position.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 25.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 0.0
"""

STREAM = """\
data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}

data: {"choices":[{"index":0,"delta":{"content":"Sea"}}]}

data: {"choices":[{"index":0,"delta":{"content":" and\\nsky"},"finish_reason":"stop"}]}

data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13}}

data: [DONE]
"""


@pytest.fixture
def api():
    """Serve canned answers; returns the URL, and the bodies of the requests in ``.bodies``."""

    class Handler(BaseHTTPRequestHandler):
        bodies: list[bytes] = []  # noqa: RUF012  shared on purpose

        def do_GET(self):
            self.reply(METRICS)

        def do_POST(self):
            self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(STREAM if b"sea" in self.bodies[-1] else "data: [DONE]\n")

        def reply(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_arguments):
            pass

    listener = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.server_port}"
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_counters_are_read(api):
    counts = acceptance.read(api)
    assert counts == Acceptance(steps=50, accepted=40, accepted_at=(25, 15, 0))
    assert counts.tokens_per_step == 1.8
    assert counts.rate_by_depth == (0.5, 0.3)


def test_server_without_speculation_counts_nothing():
    counts = acceptance.parse("# TYPE up gauge\nup 1.0\n")
    assert counts == Acceptance(0, 0, ())
    assert counts.tokens_per_step == 1.0
    assert counts.rate_by_depth == ()


def test_counts_between_two_moments_add_up():
    moments = [Acceptance(0, 0, ()), Acceptance(4, 2, (2, 0)), Acceptance(9, 8, (5, 3))]
    parts = [later.since(earlier) for earlier, later in itertools.pairwise(moments)]
    assert demo.total_acceptance(parts) == moments[-1]


def test_answer_is_streamed_and_counted(api):
    pieces = []
    answer = chat.ask(api, "m", "Tell me about the sea.", 32, pieces.append)
    assert "".join(pieces) == answer.text == "Sea and\nsky"
    assert answer.tokens == 4
    assert answer.seconds > 0


def test_empty_answer_is_a_failure(api):
    with pytest.raises(StepError, match="with nothing"):
        chat.ask(api, "m", "Tell me about the hills.", 32, lambda _piece: None)


def test_dead_server_is_a_failure():
    url = f"http://127.0.0.1:{server.free_port()}"
    with pytest.raises(StepError, match="did not answer"):
        chat.ask(url, "m", "Anyone?", 8, lambda _piece: None)


# -- the server ---------------------------------------------------------------


class ScriptPlan(server.ServerPlan):
    """Runs a Python script in place of vLLM."""

    script = ""

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-S", "-c", textwrap.dedent(self.script), str(port)]


def plan(tmp_path: Path, script: str) -> ScriptPlan:
    """Return a plan that runs ``script``."""
    made = ScriptPlan("fake", tmp_path / "model", tmp_path, "cpu")
    object.__setattr__(made, "script", script)
    return made


HEALTHY = """
    import http.server, sys, signal
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    print("non-default args", flush=True)
    {extra}
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("extra", ["pass", "signal.signal(signal.SIGINT, signal.SIG_IGN)"])
def test_server_is_awaited_and_stopped(tmp_path, monkeypatch, extra):
    # A server deaf to SIGINT must be ended by the next signal, soon.
    monkeypatch.setattr(server, "STOP_LIMIT_SECONDS", 0.5)
    seen = []
    with server.Server(plan(tmp_path, HEALTHY.format(extra=extra))) as running:
        running.wait_until_ready(lambda *step: seen.append(step))
        process = running.process
        assert process.poll() is None
    assert process.poll() is not None
    assert seen[-1] == ("ready", len(server.MILESTONES), len(server.MILESTONES))


def test_server_is_stopped_when_the_demo_is_interrupted(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        server.Server(plan(tmp_path, HEALTHY.format(extra="pass"))) as running,
    ):
        running.wait_until_ready(lambda *_step: None)
        process = running.process
        raise KeyboardInterrupt
    assert process.poll() is not None


def test_failed_start_shows_the_end_of_the_log(tmp_path):
    script = "print('line\\n' * 100 + 'RuntimeError: no heads'); raise SystemExit(3)"
    with (
        pytest.raises(StepError) as caught,
        server.Server(plan(tmp_path, script)) as running,
    ):
        running.wait_until_ready(lambda *_step: None)
    shown, sentence = caught.value.sentence.split("\n\n")
    assert shown.endswith("RuntimeError: no heads")
    assert len(shown.splitlines()) == server.LINES_SHOWN_ON_FAILURE
    assert sentence.startswith("The server 'fake' ended with exit status 3")


def test_both_servers_differ_in_the_heads_only(tmp_path):
    heads = tmp_path / "heads"
    model = tmp_path / "model"
    with_heads = server.ServerPlan("medusa", model, tmp_path, "cpu", heads).command(8000)
    without = server.ServerPlan("plain", model, tmp_path, "cpu").command(8000)
    assert with_heads == [*without, "--speculative-model", f"medusa:{heads}"]
    assert Path(without[0]).name == "vllm"


def test_cpu_server_gets_every_usable_core(tmp_path, monkeypatch):
    monkeypatch.setattr(server.host, "usable_cores", lambda: [2, 5])
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    variables = server.ServerPlan("plain", tmp_path, tmp_path, "cpu").environment()
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "2,5"
    assert variables["VLLM_CACHE_ROOT"] == str(tmp_path / "vllm")
    assert variables["HF_HUB_OFFLINE"] == "1"


# -- what is shown --------------------------------------------------------------


def test_tables_name_speeds_and_differences(capsys, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(report, "console", Console(width=report.PLAIN_WIDTH))
    rows = [
        report.Comparison(
            "Why?", Answer("a", 30, 1.0), Answer("a", 30, 2.0), Acceptance(15, 15, ())
        ),
        report.Comparison(
            "How?", Answer("b", 60, 2.0), Answer("c", 60, 2.5), Acceptance(40, 20, ())
        ),
    ]
    report.tables(rows, Acceptance(55, 35, (25, 10, 0)))
    shown = capsys.readouterr().out
    for expected in ("2.00x", "1.25x", "1.50x", "1 of 2", "45%", "18%", "depth 2", "55 steps"):
        assert expected in shown
    assert "depth 3" not in shown
    assert "1 of 2 answers differ in wording" in shown


def test_missing_heads_and_bad_options_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.signal, "signal", lambda *_arguments: None)
    assert demo.main(["--heads", str(tmp_path)]) == 1
    assert "No Medusa heads in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.main(["--questions", "99"])
    assert "--questions 99: expected 1 to 5" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "expected"), [("cuda", "bfloat16"), ("cpu", "float32")])
def test_dtype_is_the_one_in_which_medusa_is_fastest(device, expected):
    assert demo.fast_dtype(device) == expected
