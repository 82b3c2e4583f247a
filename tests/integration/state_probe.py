"""What an engine still holds of its requests, read from inside its process.

``worker_extension_cls="state_probe.StateProbe"`` gives the worker a method that
``collective_rpc`` calls.  The engine's core lives in the same process when
``VLLM_ENABLE_V1_MULTIPROCESSING=0``, which leaves vLLM's own choice of executor alone.
"""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from typing import Any

# What leads from an object into the whole interpreter.
_NO_STATE = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType,
    types.FrameType, types.MethodDescriptorType, types.GetSetDescriptorType,
)  # fmt: skip


def held_strings(roots: list[Any], prefix: str) -> list[str]:
    """Strings that begin with ``prefix`` and can be reached from ``roots``, with a way there.

    Goes through every container and instance, so no list of attributes has to be kept up
    with vLLM.

    Examples
    --------
    >>> held_strings([{"a": ["x-1"]}], "x-")
    ['dict.list: x-1']
    """
    found: dict[str, str] = {}
    seen = {id(root) for root in roots}
    queue = deque((root, type(root).__name__) for root in roots)
    alive = [roots]  # an id is unique only as long as its object lives
    while queue:
        holder, way = queue.popleft()
        referents = gc.get_referents(holder)
        alive.append(referents)
        for item in referents:
            if isinstance(item, str):
                if item.startswith(prefix):
                    found.setdefault(item, way)
            elif id(item) not in seen and not isinstance(item, _NO_STATE):
                seen.add(id(item))
                queue.append((item, f"{way}.{type(item).__name__}"[-200:]))
    return [f"{way}: {string}" for string, way in sorted(found.items())]


def resident_kilobytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def _engine_core() -> Any:
    """The EngineCore that is serving this call, a few frames up."""
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if hasattr(owner, "scheduler") and hasattr(owner, "model_executor"):
            return owner
        frame = frame.f_back
    raise RuntimeError("the worker does not run in its engine core's process")


class StateProbe:
    """Methods of the worker."""

    def resident_memory(self) -> int:
        """Kilobytes."""
        return resident_kilobytes()

    def request_state(self, prefix: str) -> dict[str, Any]:
        """All that must be as it was before the first request.

        ``idle`` is false as long as the engine still has something to do.
        """
        core = _engine_core()
        scheduler, runner = core.scheduler, self.model_runner
        pool = scheduler.kv_cache_manager.block_pool
        state = {
            "idle": not scheduler.has_requests() and not scheduler.finished_req_ids,
            "held": held_strings([core, self], prefix),
            "requests": len(scheduler.requests),
            "free_blocks": pool.get_num_free_blocks(),
            "referenced_blocks": sum(block.ref_cnt > 0 for block in pool.blocks[1:]),
            "blocks_of_requests": sum(
                len(manager.req_to_blocks) + len(manager.num_cached_block)
                for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
            ),
        }
        if hasattr(runner, "req_states"):
            state["runner_requests"] = runner.req_states.num_reqs
            state["free_slots"] = len(runner.req_states.free_indices)
        else:  # vLLM's V1 runner
            state["runner_requests"] = len(runner.requests)
        verifier = getattr(runner, "rejection_sampler", None)
        if hasattr(verifier, "row_sampler"):
            state |= {
                "node_budgets": len(scheduler._node_budgets),
                "chained_slots": int(verifier.row_sampler.reads_history.sum()),
                "typical_slots": int(verifier.typical.active.sum()),
                "simple_slots": int(runner.verification_step.simple.sum()),
            }
        return state
