"""One `vllm serve` on a free local port: started, waited for, always stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_medusa.demo import host
from vllm_medusa.demo.failure import StepError

MAX_MODEL_LEN = 2048
START_LIMIT_SECONDS = 600
STOP_LIMIT_SECONDS = 20
POLL_SECONDS = 0.25
LINES_SHOWN_ON_FAILURE = 25

# More threads than this do not speed up a model of 135 M parameters.
MOST_THREADS = 8

# What vLLM logs while it starts, in order -> what it is doing after that.
MILESTONES = (
    ("non-default args", "reading the configuration"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "compiling and warming up"),
    ("init engine", "opening the API"),
    ("Application startup complete", "ready"),
)

# (what it is doing, milestones passed, number of milestones)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ServerPlan:
    """What to serve and how; the same for both servers but for the heads."""

    name: str
    model: Path
    cache: Path
    device: str  # "cpu" or "cuda"
    heads: Path | None = None  # Medusa heads; None serves without speculation
    eager: bool = False  # no torch.compile
    dtype: str = "bfloat16"

    @property
    def log_file(self) -> Path:
        """Where the server's output goes."""
        return self.cache / "logs" / f"serve-{self.name}.log"

    def command(self, port: int) -> list[str]:
        """Return the command line of `vllm serve`."""
        vllm = str(Path(sys.executable).parent / "vllm")
        command = [vllm, "serve", str(self.model), "--served-model-name", self.model.name]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "4"]
        command += ["--dtype", self.dtype]
        if self.device == "cuda":
            # Leave room for whatever else uses this GPU; the model needs 0.3 GB.
            command += ["--gpu-memory-utilization", "0.5"]
        if self.eager:
            command += ["--enforce-eager"]
        if self.heads is not None:
            command += ["--speculative-model", f"medusa:{self.heads}"]
        return command

    def environment(self) -> dict[str, str]:
        """Return the process environment: local files only, caches kept for the next run."""
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self.cache / "vllm"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "PYTHONUNBUFFERED": "1",
        }
        if self.device == "cpu":
            cores = host.usable_cores()[:MOST_THREADS]
            # By default vLLM keeps one core for the engine's own loop, which on
            # two cores leaves one for the model.
            variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
            variables.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            # Where a GPU is present but was declined, keep it out of sight.
            variables["CUDA_VISIBLE_DEVICES"] = ""
        return variables


class Server:
    """A running server; a context manager that stops it in every case."""

    def __init__(self, plan: ServerPlan) -> None:
        self.plan = plan
        self.port = free_port()
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Root of the server's HTTP interface."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        self.plan.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.plan.log_file.open("w") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which then
            # stops the server and all processes it started.
            self.process = subprocess.Popen(
                self.plan.command(self.port),
                env=self.plan.environment(),
                cwd=self.plan.cache,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_exception) -> None:
        self.stop()

    def wait_until_ready(self, progress: Progress) -> None:
        """Wait for the API; raise with the end of the log when it does not come."""
        begun = time.monotonic()
        while not self.is_healthy():
            passed = self.milestones_passed()
            doing = MILESTONES[passed - 1][1] if passed else "importing vLLM"
            progress(doing, passed, len(MILESTONES))
            if self.process.poll() is not None:
                raise StepError(self.failure(f"ended with exit status {self.process.returncode}"))
            if time.monotonic() - begun > START_LIMIT_SECONDS:
                raise StepError(self.failure(f"was not ready after {START_LIMIT_SECONDS} s"))
            time.sleep(POLL_SECONDS)
        progress("ready", len(MILESTONES), len(MILESTONES))

    def is_healthy(self) -> bool:
        """Tell whether the API answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def milestones_passed(self) -> int:
        """Count how far the start has come by what the log says."""
        text = self.plan.log_file.read_text(errors="replace")
        reached = [number for number, (mark, _) in enumerate(MILESTONES, 1) if mark in text]
        return max(reached, default=0)

    def failure(self, what: str) -> str:
        """Compose the sentence for a server that failed, after the end of its log."""
        lines = self.plan.log_file.read_text(errors="replace").splitlines()
        shown = "\n".join(lines[-LINES_SHOWN_ON_FAILURE:])
        return (
            f"{shown}\n\nThe server '{self.plan.name}' {what}: the reason is in the lines above "
            f"and in {self.plan.log_file}; mend that and run the same command again."
        )

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process is None:
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(timeout=STOP_LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        self.process = None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
