"""Any file in the place of heads: a correct load or one clear error, and nothing else.

Nothing else means: no other exception, no endless read, no gigabytes, no executed pickle.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from head_file_cases import TRACE, Case, write_case
from head_pickle_cases import live_programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_medusa.checkpoint import CheckpointError, HeadWeights, load_heads
from vllm_medusa.tree import TokenTree

# Of torch, on pickles that it then refuses.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

FEW, PARTS, PER_PART = 3000, 10, 100_000
# Address space that a case may add; the largest that loads here holds a few kilobytes.
MOST_MEMORY = 1 << 30
# Far above any honest case (milliseconds): only an endless loop gets there.
HANG_S = 60


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Refuse huge allocations and interrupt endless reads while active."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (min(limit, hard) if hard > 0 else limit, hard))
    previous = signal.signal(signal.SIGALRM, _hang)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        logging.disable(level)


def _hang(*_: object) -> None:
    raise AssertionError(f"a case ran for {HANG_S} s")


def check(case: Case) -> bool:
    """Load one case; True when it loaded.  Raises what a user must never see."""
    signal.alarm(HANG_S)
    try:
        weights = load_heads(case.path, **case.arguments)
    except CheckpointError as error:
        message = str(error)
        assert all(word in message for word in ("found", "expected", ";")), message
        assert "\n" not in message, message
        return False
    finally:
        assert not (case.directory / TRACE).exists(), "a pickle was executed"
        signal.alarm(0)
    assert torch.isfinite(weights.weight).all()
    if case.tensors is not None:
        assert_same(weights, case.tensors)
    if weights.tree_path is not None:
        with contextlib.suppress(ValueError):
            TokenTree.load(weights.tree_path)
    return True


def assert_same(weights: HeadWeights, tensors: dict[str, torch.Tensor]) -> None:
    """The layers that were written are the layers that were read."""
    dtype = weights.spec.dtype
    for head in range(weights.spec.num_heads):
        for layer in range(weights.spec.num_layers):
            if weights.metadata.get("tied_layers"):
                layer = 0
            keys = (f"{head}.{layer}.linear.weight", f"blocks.{head}.layers.{layer}.weight")
            written = [t for key, t in tensors.items() if key.endswith(keys)]
            scaled = any(t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for t in written)
            same = [t.to(dtype) for t in written if not scaled]
            assert scaled or any(torch.equal(weights.weight[layer, head], t) for t in same)


def test_the_bombs_are_live(tmp_path):
    """A loader that executes what it reads would leave the trace that :func:`check` looks for."""
    trace = tmp_path / TRACE
    for program in live_programs(str(trace).encode()):
        pickle.loads(program)
        trace.rmdir()


@settings(max_examples=FEW, suppress_health_check=list(HealthCheck), print_blob=True)
@given(rng=st.randoms(use_true_random=False))
def test_any_file_loads_or_is_refused(tmp_path_factory, rng):
    case = write_case(rng, tmp_path_factory.getbasetemp() / "fuzz")
    with bounded():
        check(case)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_a_million_files_load_or_are_refused(tmp_path, capsys, part):
    """Seeds 0 to 10^6 - 1; a failure names its seed, so `write_case(Random(seed), ..)` is it."""
    started, loaded = time.monotonic(), 0
    with bounded():
        for seed in range(part * PER_PART, (part + 1) * PER_PART):
            case = write_case(random.Random(seed), tmp_path / "fuzz")
            try:
                loaded += check(case)
            except BaseException as error:
                raise AssertionError(f"seed {seed}, {case.steps}, {case.arguments}") from error
    rate = PER_PART / (time.monotonic() - started)
    with capsys.disabled():
        print(f"\n{PER_PART} files, {loaded} of them loaded, {rate:.0f} a second")
    # Both outcomes really happen.
    assert 0.05 < loaded / PER_PART < 0.95
