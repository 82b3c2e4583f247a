"""Kernel tests: the same tests run on a GPU and, without one, under Triton's interpreter.

``TRITON_INTERPRET=1`` is a trap in a process that also runs vLLM: every ``@triton.jit``
evaluated while it is set becomes an interpreted function, vLLM's included, and child
processes inherit it.  So it is set only while Triton and our launchers are imported and
while the tests of this directory run; vLLM imported later in this process by other tests,
and vLLM in their child processes, see nothing of it.  The reverse order cannot be repaired:
once Triton has been imported without the variable its own library (``tl.sum`` and so on)
cannot be interpreted, and the tests then ask for a process of their own.
"""

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def _import_launchers() -> None:
    if "triton" in sys.modules:
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(tl.sum, InterpretedFunction):
            raise pytest.UsageError(
                "Triton was imported before tests/kernels/conftest.py could switch on its "
                "interpreter; run `python -m pytest tests/kernels` as a process of its own"
            )
    from vllm_medusa import triton_kernels

    for name in triton_kernels.__all__:
        getattr(triton_kernels, name)


if not HAS_GPU:
    with _interpreter():
        _import_launchers()


@pytest.fixture(scope="module", autouse=True)
def _interpreter_without_gpu() -> Iterator[None]:
    """Parts of Triton look at the variable when a kernel is launched, not at import."""
    with _interpreter():
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device (size out of the interpreter's reach)")
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels of this run live."""
    return torch.device("cuda:0" if HAS_GPU else "cpu")
