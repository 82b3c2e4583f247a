"""Kernels compile for an H100; the interpreter, which runs them as Python, cannot tell."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str | None]:
    """Error of every variant, from a process in which Triton compiles."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Not what an earlier run has left.
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, str(SCRIPT), str(folder / "results.json")]
    subprocess.run(command, check=True, timeout=600, env=environment)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    "variant",
    [
        "attention",
        "attention, two words, window",
        "attention, float8",
        "attention before a join",
        "join",
        "tree part, two words",
        "tree part, float8",
        "KV move",
        "KV move, two words",
        "positions and masks, two words",
        "walk",
        "walk, two words",
        "draft",
        "draft with noise",
        "top tokens",
        "top tokens in columns",
        "top tokens with noise",
        "top tokens in columns with noise",
        "paths of sequential heads",
        "update of sequential heads",
        "update without a bias",
        "float8 product",
        "float8 product by warp groups",
        "float8 residual layer",
        "chosen tree",
        "chosen tree with chains",
        "lookup",
        "lookup by one program",
        "right children",
    ],
)
def test_kernel_compiles(results, variant):
    assert results[variant] is None, results[variant]


def test_every_variant_is_looked_at(results):
    assert len(results) == 29
