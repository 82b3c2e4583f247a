"""pip inside the environment: its own progress bars, its failures in one sentence."""

import os
import re
import subprocess
from pathlib import Path

try:
    from . import requirements
    from .failure import StepError
except ImportError:  # run as a script: the folder itself is on sys.path
    import requirements
    from failure import StepError

# What pip's log says -> what that means here.  The first match counts.
DIAGNOSES = (
    (
        r"No space left on device|Disk quota exceeded",
        "the disk is full: free some space, or point VLLM_MEDUSA_VENV, VLLM_MEDUSA_CACHE and "
        "TMPDIR at a larger disk, and run this again",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "the package index's certificate was not accepted: give pip your network's certificate "
        "(PIP_CERT) and run this again",
    ),
    (
        r"Temporary failure in name resolution|Name or service not known|NewConnectionError|"
        r"Network is unreachable|Connection refused|ReadTimeout|ConnectTimeout|ProxyError|"
        r"Connection broken|Connection aborted",
        "the package index cannot be reached: check the network, a proxy (HTTPS_PROXY) or pip's "
        "index settings, and run this again",
    ),
    (
        r"Permission denied|Read-only file system",
        "a folder cannot be written: make the checkout writable or name other folders in "
        "VLLM_MEDUSA_VENV and VLLM_MEDUSA_CACHE",
    ),
    (
        r"No matching distribution found for (\S+)",
        "no package index that pip knows has {0} for this Python and machine: try another Python "
        "from 3.11 to 3.14 (make demo PYTHON=python3.12)",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the pinned versions contradict a constraint that pip was given: look for one in "
        "PIP_CONSTRAINT or pip's configuration and lift it",
    ),
)


class Pip:
    """Runs pip under one interpreter and keeps a log per step."""

    def __init__(self, python: Path, log_folder: Path) -> None:
        self.python = python
        self.log_folder = log_folder

    def run(self, step: str, arguments: list[str]) -> Path | None:
        """Run pip; return None when it succeeded, else the path of its log."""
        log = self.log_folder / f"pip-{step}.log"
        log.unlink(missing_ok=True)
        command = [str(self.python), "-m", "pip", "--log", str(log)]
        command += ["--disable-pip-version-check", *arguments]
        environment = {**os.environ, "PYTHONNOUSERSITE": "1", "PIP_NO_INPUT": "1"}
        done = subprocess.run(command, env=environment, check=False, stdin=subprocess.DEVNULL)
        return None if done.returncode == 0 else log

    def install(self, step: str, arguments: list[str]) -> None:
        """Install or raise the sentence that explains why not."""
        # Byte-compiling all of vLLM takes longer than the few modules that run
        # need; Python compiles those when they are first imported.
        log = self.run(step, ["install", "--no-compile", *arguments])
        if log is not None:
            raise StepError(explain(step, log))

    def install_torch_cpu(self) -> None:
        """Install torch+cpu from the configured sources, else from PyTorch's index."""
        torch = requirements.TORCH_CPU
        # Its dependencies come with vLLM's; PyTorch's index holds old ones.
        first = self.run("torch", ["install", "--no-compile", "--no-deps", torch])
        if first is None:
            return
        print(f"Not found there; asking {requirements.TORCH_CPU_INDEX}", flush=True)
        index = ["--index-url", requirements.TORCH_CPU_INDEX]
        self.install("torch-index", ["--no-deps", *index, torch])

    def uninstall(self, step: str, distributions: tuple[str, ...]) -> None:
        """Remove distributions; those not installed are no failure."""
        log = self.run(f"{step}-uninstall", ["uninstall", "--yes", *distributions])
        if log is not None:
            raise StepError(explain(step, log))


def explain(step: str, log: Path) -> str:
    """Turn a failed pip run's log into one sentence."""
    text = log.read_text(errors="replace") if log.exists() else ""
    for pattern, meaning in DIAGNOSES:
        found = re.search(pattern, text)
        if found:
            reason = meaning.format(*found.groups())
            return f"Installing step '{step}' failed, {reason} (log: {log})."
    return (
        f"Installing step '{step}' failed for a reason that pip names above and in {log}: mend "
        "that and run the same command again."
    )
