"""`vllm serve` on a free local port, and clients that say how their stream ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
START_S, STOP_S, ANSWER_S = 300, 60, 120
# Bodies name a model; the servers give theirs this name.
NAME = "tiny"
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


class Server:
    """One server in a session of its own, so that all its processes can be stopped."""

    def __init__(self, folder: Path, name: str, arguments: list[str], env: dict[str, str]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / f"{name}.log"
        template = folder / "template.jinja"
        template.write_text(TEMPLATE)
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
        command += ["--served-model-name", NAME, "--chat-template", str(template)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "VLLM_NO_USAGE_STATS": "1",
                    "OMP_NUM_THREADS": "1",
                    **env,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/health")[0] == 200:
                    return
            time.sleep(0.25)
        raise RuntimeError(f"no server:\n{self.log.read_text()[-6000:]}")

    def connect(self) -> http.client.HTTPConnection:
        """A connection; reading that takes too long raises TimeoutError."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)

    def request(self, method: str, path: str, body: dict | None = None) -> tuple[int, Any]:
        """Status and JSON (or text) of one answer."""
        connection = self.connect()
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        with contextlib.closing(connection):
            answer = connection.getresponse()
            text = answer.read().decode()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def stream(self, path: str, body: dict) -> Iterator[dict]:
        """Chunks of a streamed answer; ends with {"done": True} only if the server said so."""
        connection = self.connect()
        body = {"model": NAME, "temperature": 0, **body, "stream": True}
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        with contextlib.closing(connection):
            answer = connection.getresponse()
            if answer.status != 200:
                yield {"error": {"code": answer.status, "message": answer.read().decode()}}
                return
            for line in answer:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    yield {"done": True} if data == b"[DONE]" else json.loads(data)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Children by the role that vLLM writes into their title."""
        found: dict[str, list[psutil.Process]] = {"EngineCore": [], "Worker": []}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            title = " ".join(child.cmdline())
            for role, children in found.items():
                if f"VLLM::{role}" in title:
                    children.append(child)
        return found

    def stop(self) -> None:
        """End it and all it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S if number == signal.SIGTERM else None)


def text_of(chunk: dict) -> str:
    """What a chunk of either kind adds to its first choice's text."""
    parts = ""
    for choice in chunk.get("choices", []):
        parts += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return parts


def read_to_the_end(
    server: Server, path: str, body: dict, began: threading.Semaphore | None = None
) -> tuple[str, str]:
    """Text, and how the stream ended.

    Returns
    -------
    text : str
    end : str
        ``done``; ``error`` (the server said that something failed, in the stream or by its
        status); ``cut`` (the connection broke, or ended without a word); ``hang``.
    """
    text, chunks, end = "", 0, "cut"
    try:
        for chunk in server.stream(path, body):
            text += text_of(chunk)
            chunks += 1
            if chunks == 3 and began is not None:
                began.release()
            if "error" in chunk:
                end = "error"
            elif chunk.get("done") and end != "error":
                end = "done"
    except TimeoutError:
        return text, "hang"
    except (OSError, http.client.HTTPException):
        return text, "cut" if end == "done" else end
    return text, end


def all_at_once(server: Server, asked: list[tuple[str, dict]]) -> list[tuple[str, str]]:
    """:func:`read_to_the_end` of several clients."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda each: read_to_the_end(server, *each), asked))
