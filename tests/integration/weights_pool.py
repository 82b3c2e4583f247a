"""Which of the plugin's tensors lie in the memory that sleep of level 2 throws away.

vLLM's worker loads models inside a memory pool.  On a GPU level 2 drops its contents and
brings back parameters and buffers of target and heads; a CPU has no pool, but the same code.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

RESTORED = ("_parameters", "_buffers")


def _tensors() -> dict[int, torch.Tensor]:
    """Address -> one tensor there, of all that are alive."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # without memory
                found[thing.untyped_storage().data_ptr()] = thing
    return found


@contextlib.contextmanager
def watched() -> Iterator[dict[int, torch.Tensor]]:
    """Fill the dictionary with what vLLM's ``Worker.load_model`` allocates meanwhile."""
    from vllm.v1.worker.gpu_worker import Worker

    original, pool = Worker.load_model, {}

    def load_model(self, **kwargs):
        before = _tensors()
        original(self, **kwargs)
        # Kept alive, so that nothing made later gets the same address.
        pool.update({k: t for k, t in _tensors().items() if k not in before})

    Worker.load_model = load_model
    try:
        yield pool
    finally:
        Worker.load_model = original


def report(runner: Any, pool: dict[int, torch.Tensor]) -> dict[str, list[str]]:
    """Names of the heads' tensors in the pool, and of all others that the plugin owns there."""
    heads = runner.speculator.model
    inside = [n for n, p in heads.named_parameters() if p.untyped_storage().data_ptr() in pool]
    return {"heads": sorted(inside), "others": sorted(set(_inside(runner, pool, "runner", set())))}


def _inside(thing: Any, pool: dict[int, torch.Tensor], name: str, seen: set[int]) -> Iterator[str]:
    if isinstance(thing, torch.Tensor):
        if thing.untyped_storage().data_ptr() in pool:
            yield name
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, dict):
        parts = thing
    elif isinstance(thing, (list, tuple)):
        parts = dict(enumerate(thing))
    elif type(thing).__module__.startswith("vllm_medusa"):
        parts = dict(getattr(thing, "__dict__", {}))
        if isinstance(thing, nn.Module):
            parts = {key: part for key, part in parts.items() if key not in RESTORED}
    else:
        return
    for key, part in parts.items():
        yield from _inside(part, pool, f"{name}.{key}", seen)
