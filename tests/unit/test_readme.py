"""What README tells to type."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from vllm_medusa.demo.requirements import VLLM_STAND_IN

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_command_makes_the_distribution_that_vllm_asks_for(tmp_path):
    command = next(line for line in README.splitlines() if line.startswith("python -c"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = str(tmp_path / "bin" / "python")
    arguments = shlex.split(command)[1:]
    subprocess.run([python, *arguments], check=True)
    ask = "import importlib.metadata as m; print(m.version('vllm'))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == VLLM_STAND_IN


def test_pinned_versions_are_the_demo_s():
    from vllm_medusa.demo import requirements

    pinned = set(re.findall(r"triton==[\d.]+", README))
    assert pinned <= set(requirements.VLLM_ON_CPU)
