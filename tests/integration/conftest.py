"""Engines run in processes of their own; these fixtures write jobs and read results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
JOB_TIMEOUT_S = 600
SERIES_TIMEOUT_S = 1800


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a tiny float32 Llama and of heads fitted to it."""
    sys.path.insert(0, str(HERE))
    import tiny as builder

    root = tmp_path_factory.mktemp("tiny")
    model = builder.make_model(root / "model")
    builder.fit_heads(model, root / "heads")
    return {"model": str(root / "model"), "heads": str(root / "heads")}


@pytest.fixture(scope="session")
def run_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """``run_job(engine, batches, **options) -> result``; a failure shows the engine's output."""

    def run(engine: dict, batches: list[dict], env: dict | None = None, **options) -> dict:
        folder = tmp_path_factory.mktemp("job")
        job, result = folder / "job.json", folder / "result.json"
        job.write_text(json.dumps({"engine": engine, "batches": batches, **options}))
        process = subprocess.run(
            [sys.executable, str(HERE / "engine_job.py"), str(job), str(result)],
            env={**os.environ, "PYTHONPATH": _paths(), **(env or {})},
            capture_output=True,
            text=True,
            timeout=JOB_TIMEOUT_S,
        )
        if process.returncode != 0 or not result.exists():
            pytest.fail(f"engine job failed:\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}")
        return json.loads(result.read_text())

    return run


@pytest.fixture(scope="session")
def run_series(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """``run_series({name: job}) -> {name: result or {"error": text}}``, all in one process."""

    def run(jobs: dict[str, dict], env: dict | None = None) -> dict:
        folder = tmp_path_factory.mktemp("series")
        source, target = folder / "jobs.json", folder / "results.json"
        source.write_text(json.dumps(jobs))
        process = subprocess.run(
            [sys.executable, str(HERE / "engine_series.py"), str(source), str(target)],
            env={**os.environ, "PYTHONPATH": _paths(), **(env or {})},
            capture_output=True,
            text=True,
            timeout=SERIES_TIMEOUT_S,
        )
        if process.returncode != 0 or not target.exists():
            pytest.fail(f"series failed:\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}")
        return json.loads(target.read_text())

    return run


def _paths() -> str:
    """This folder in front of what the caller's Python already searches."""
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
