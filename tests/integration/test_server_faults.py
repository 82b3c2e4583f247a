"""A process of the server dies in mid-stream: what clients and server do is plain vLLM's."""

from __future__ import annotations

import json
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from http_server import Server, read_to_the_end

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ARGUMENTS = [
    "--dtype=float32", "--max-model-len=1024", "--enforce-eager", "--seed=0", "--max-num-seqs=3",
    "--block-size=32", "--num-gpu-blocks-override=160",
]  # fmt: skip
# One more than run at a time: its client waits in the queue.
CLIENTS, EXIT_S = 4, 120
# A thousand steps: nobody is done when the process dies.
BODY = {"max_tokens": 1000, "ignore_eos": True}


def fault(server: Server, role: str) -> dict:
    """Kill the process with this role while clients read; how everything ends."""
    server.wait()
    began = threading.Semaphore(0)
    with ThreadPoolExecutor(CLIENTS) as pool:
        reading = [
            pool.submit(
                read_to_the_end,
                server,
                "/v1/completions",
                {**BODY, "prompt": f"Client {index}"},
                began,
            )
            for index in range(CLIENTS)
        ]
        for _ in range(CLIENTS - 1):
            assert began.acquire(timeout=EXIT_S)
        (victim,) = server.processes()[role]
        victim.kill()
        ends = [future.result(EXIT_S)[1] for future in reading]
    try:
        code = server.process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        code = None
    return {"ends": sorted(ends), "exit code": code, "left behind": victim.is_running()}


@pytest.fixture(scope="module", params=["EngineCore", "Worker"])
def outcomes(request, tiny_spelled, tmp_path_factory) -> dict[str, dict]:
    """``plain`` and ``medusa`` -> what happened."""
    folder = tmp_path_factory.mktemp("faults")
    heads = {"method": "medusa", "model": tiny_spelled["heads"], "num_speculative_tokens": 8}
    medusa = [f"--speculative-config={json.dumps(heads)}"]
    servers = {
        name: Server(folder, name, [tiny_spelled["model"], *ARGUMENTS, *more], {})
        for name, more in (("plain", []), ("medusa", medusa))
    }
    try:
        return {name: fault(server, request.param) for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.stop()


def test_a_killed_process_ends_in_errors_not_in_silence(outcomes):
    assert outcomes["medusa"] == outcomes["plain"]
    assert set(outcomes["medusa"]["ends"]) <= {"error", "cut"}
    # Neither lives on without its engine.
    assert outcomes["medusa"]["exit code"] is not None
