"""Engines run in processes of their own; these fixtures write jobs and read results."""

from __future__ import annotations

import json
import os
import shutil
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
def tiny_spelled(
    tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The same with a tokenizer of single characters."""
    import tiny_tokenizer

    directory = tmp_path_factory.mktemp("spelled") / "model"
    shutil.copytree(tiny["model"], directory)
    tiny_tokenizer.write_tokenizer(directory)
    return {**tiny, "model": str(directory)}


@pytest.fixture(scope="session")
def run_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """``run_job(engine, batches, **options) -> result``; a failure shows the engine's output."""

    def run(engine: dict, batches: list[dict], env: dict | None = None, **options) -> dict:
        job = {"engine": engine, "batches": batches, **options}
        return _run_script("engine_job.py", tmp_path_factory.mktemp("job"), job, env, JOB_TIMEOUT_S)

    return run


@pytest.fixture(scope="session")
def run_series(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """``run_series({name: job}) -> {name: result or {"error": text}}``, all in one process."""

    def run(jobs: dict[str, dict], env: dict | None = None, prefix: tuple[str, ...] = ()) -> dict:
        folder = tmp_path_factory.mktemp("series")
        return _run_script("engine_series.py", folder, jobs, env, SERIES_TIMEOUT_S, prefix)

    return run


@pytest.fixture(scope="session")
def run_replicas(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """``run_replicas(job) -> result`` of an engine with ``data_parallel_size``."""

    def run(job: dict, env: dict | None = None) -> dict:
        return _run_script("dp_job.py", tmp_path_factory.mktemp("dp"), job, env, JOB_TIMEOUT_S)

    return run


@pytest.fixture(scope="session")
def cluster_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which every process finds the tests' plugin, and ranks are compared."""
    import cluster_plugin

    return {
        "PYTHONPATH": os.pathsep.join(
            [cluster_plugin.install(tmp_path_factory.mktemp("plugin")), _paths()]
        ),
        cluster_plugin.RAY_VARIABLE: "1",
        cluster_plugin.ASYNC_VARIABLE: "1",
        "VLLM_MEDUSA_CHECK_RANKS": "1",
        "VLLM_CPU_CI_ENV": "1",
        # Steps of tiny models: a rank that waits for a dead one must not do so for minutes.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "60",
    }


def _run_script(
    script: str,
    folder: Path,
    order: dict,
    env: dict | None,
    timeout: int,
    prefix: tuple[str, ...] = (),  # a command that runs the rest, such as "ip netns exec NAME"
) -> dict:
    """Hand ``order`` to a script in a process of its own and return what it wrote."""
    source, target = folder / "order.json", folder / "result.json"
    source.write_text(json.dumps(order))
    process = subprocess.run(
        [*prefix, sys.executable, str(HERE / script), str(source), str(target)],
        env={**os.environ, "PYTHONPATH": _paths(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    results = json.loads(target.read_text()) if target.exists() else {}
    # An engine that failed may end its process as it likes: vLLM's Ray executor looks for the
    # actors that it has killed once more, and exits with an error of its own.
    failed = any(isinstance(r, dict) and "error" in r for r in (results, *results.values()))
    if not results or (process.returncode != 0 and not failed):
        pytest.fail(f"{script} failed:\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}")
    return results


def _paths() -> str:
    """This folder in front of what the caller's Python already searches."""
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
