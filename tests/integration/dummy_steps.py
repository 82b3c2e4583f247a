"""Watches the steps that a data-parallel rank without work runs, for the tests' plugin.

A mixture of experts computes on all ranks or on none, so an idle rank joins in with a dummy
batch.  Under Medusa that is a tree whose drafts belong to nobody: the same rows, the same heads
as on a busy rank, and nothing of a request, of a waiting tree or of the KV cache may change.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.import_watch import after_import

VARIABLE = "TEST_DUMMY_STEPS"


def watch() -> None:
    """Let this process's worker, if it becomes one, report under the folder of ``VARIABLE``."""
    after_import("vllm_medusa.cpu_worker", _wrap)


def reports(folder: Path) -> dict[int, dict]:
    """Rank -> what :class:`_Report` counted there."""
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def _wrap(module: Any) -> None:
    original = module.MedusaCPUWorker.execute_dummy_batch

    def execute_dummy_batch(self):
        if not hasattr(self, "dummy_report"):
            self.dummy_report = _Report(self.model_runner)
        self.dummy_report.observe(lambda: original(self))

    module.MedusaCPUWorker.execute_dummy_batch = execute_dummy_batch


class _Report:
    """Counts the dummy steps of a rank: all, with a tree, that drafted for nobody, harmful."""

    def __init__(self, runner: Any):
        self.runner = runner
        self.counts = {"steps": 0, "trees": 0, "drafted": 0, "changed": []}

    def observe(self, step: Any) -> None:
        """Run a dummy step between two looks at what it must leave alone."""
        speculator = self.runner.speculator
        slots: list[int] = []

        def draft(hidden, rows, *args):
            slots.extend(rows.tolist())
            return type(speculator).draft(speculator, hidden, rows, *args)

        before = self._state()
        speculator.draft = draft
        try:
            step()
        finally:
            del speculator.draft
        after = self._state()
        self.counts["steps"] += 1
        self.counts["trees"] += self.runner.tree_batch.num_tree_reqs > 0
        self.counts["drafted"] += bool(slots) and max(slots) < 0
        changed = [name for name, was in before.items() if not torch.equal(was, after[name])]
        self.counts["changed"] = sorted({*self.counts["changed"], *changed})
        from vllm.distributed import get_dp_group

        target = Path(os.environ[VARIABLE]) / f"{get_dp_group().rank_in_group}.json"
        target.write_text(json.dumps(self.counts))

    def _state(self) -> dict[str, torch.Tensor]:
        """Copies of the requests' state, their trees, and all cache blocks but the null block."""
        states, trees = self.runner.req_states, self.runner.tree_batch
        found = {
            "computed tokens": states.num_computed_tokens.gpu,
            "sampled tokens": states.last_sampled_tokens,
            "drafts": states.draft_tokens,
            "lengths": states.total_len.gpu,
            "parents": trees.parents,
            "depths": trees.depths,
            "masks": trees.masks,
        }
        found |= {f"cache {i}": cache[1:] for i, cache in enumerate(self.runner.kv_caches)}
        return {name: tensor.clone() for name, tensor in found.items()}
