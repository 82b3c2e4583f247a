"""Run all cases in this process and save their outputs: ``python -m cpu_cases.run OUT``.

Under ``TRITON_INTERPRET=1`` the kernels are vLLM's own, else the fall-backs.
"""

import functools
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends import backends

# vLLM on a CPU keeps its kernels only if Triton lists a backend of this name.
backends.setdefault("cpu", SimpleNamespace(driver=None))


def accept_integer_masks() -> None:
    """Work around Triton's interpreter, which stores some masks as int8 and then refuses them."""
    from triton.runtime.interpreter import InterpreterBuilder

    def with_bool_mask(access, position):
        def masked_access(self, *args):
            mask = args[position]
            mask.data = mask.data.astype(bool)
            return access(self, *args)

        return masked_access

    InterpreterBuilder.create_masked_load = with_bool_mask(InterpreterBuilder.create_masked_load, 1)
    InterpreterBuilder.create_masked_store = with_bool_mask(
        InterpreterBuilder.create_masked_store, 2
    )


def register_counted() -> set[str]:
    """Register the fall-backs; the returned set fills with the names of those called."""
    from vllm.triton_utils.dispatcher import register_kernels

    from vllm_medusa.cpu_kernels.registry import FALLBACKS

    called = set()

    def counted(name, fallback):
        # `wraps` keeps the signature, by which vLLM decides how to pass arguments.
        @functools.wraps(fallback)
        def call(*args, **kwargs):
            called.add(name)
            return fallback(*args, **kwargs)

        return call

    register_kernels({name: counted(name, fallback) for name, fallback in FALLBACKS.items()})
    return called


def main(path: str) -> None:
    """Run every case and save ``{"outputs": {case: {name: tensor}}, "called": [kernel]}``."""
    if triton.knobs.runtime.interpret:
        accept_integer_masks()
        called = set()
    else:
        called = register_counted()
    from cpu_cases import sampling, speculation, step

    outputs = {}
    for module in (step, sampling, speculation):
        for name, case in module.CASES.items():
            # The same inputs in both halves, and for a case alone or among others.
            outputs[name] = case(np.random.default_rng(zlib.crc32(name.encode())))
    torch.save({"outputs": outputs, "called": sorted(called)}, path)


if __name__ == "__main__":
    main(sys.argv[1])
