"""The engine core may be forked from the process that read the heads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm

# In a process of its own: this one has used PyTorch's threads already.
SCRIPT = """
import contextlib, os, signal, sys, torch
torch.set_num_threads(2)
from vllm_medusa.speculative_config import one_thread
from vllm_medusa.checkpoint import load_heads

with {context}():
    load_heads(sys.argv[1], hidden_size=576, vocab_size=49152)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    torch.zeros(20_000_000).add_(1)
    os._exit(0)
_, status = os.waitpid(pid, 0)
print("ended" if os.WIFEXITED(status) else "hung")
"""
HEADS = "vllm_medusa/assets/smollm2-135m-instruct"


@pytest.mark.parametrize(
    "context, outcome", [("one_thread", "ended"), ("contextlib.nullcontext", "hung")]
)
def test_a_forked_engine_can_use_threads(pytestconfig, context, outcome):
    """The second row shows that the test sees the fault."""
    script = SCRIPT.format(context=context)
    result = subprocess.run(
        [sys.executable, "-c", script, str(pytestconfig.rootpath / HEADS)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        check=True,
    )
    assert result.stdout.strip().splitlines()[-1] == outcome
