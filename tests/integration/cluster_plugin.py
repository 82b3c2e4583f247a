"""A vLLM plugin of the tests: Ray on a CPU, and workers that misbehave on request.

vLLM refuses Ray on a CPU because its platform names no Ray resource; the subclass names the
one that ``ray start --num-gpus`` makes up.  :func:`install` makes a folder in which Python
finds this module's entry points, for processes that have it on their PYTHONPATH.
"""

from __future__ import annotations

import os
from pathlib import Path

RAY_VARIABLE = "TEST_RAY_ON_CPU"
ASYNC_VARIABLE = "TEST_ASYNC_SCHEDULING"
EXPERTS_VARIABLE = "TEST_EXPERT_COLLECTIVES"
MISBEHAVIOUR = "TEST_MISBEHAVIOUR"

ENTRY_POINTS = """
[vllm.platform_plugins]
cluster_plugin = cluster_plugin:platform

[vllm.general_plugins]
cluster_plugin = cluster_plugin:misbehave
"""


def install(folder: Path) -> str:
    """Write the entry points; returns what belongs on PYTHONPATH."""
    info = folder / "cluster_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cluster-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return os.pathsep.join([str(folder), str(Path(__file__).parent)])


def platform() -> str | None:
    """Entry point of ``vllm.platform_plugins``."""
    return "cluster_platform.ClusterCpuPlatform" if os.environ.get(RAY_VARIABLE) else None


def misbehave() -> None:
    """Entry point of ``vllm.general_plugins``: spoil what this process was asked to spoil."""
    import dummy_steps

    if os.environ.get(dummy_steps.VARIABLE):
        dummy_steps.watch()
    what = os.environ.get(MISBEHAVIOUR)
    if what == "earlier stages do not compact":
        _keep_earlier_stages_from_compacting()
    elif what == "rank 1 drafts something else":
        _let_rank_1_draft_something_else()
    elif what == "rank 1 has no heads":
        _take_heads_from_rank_1()
    elif what == "rank 1 dies":
        _let_rank_1_die()


def _keep_earlier_stages_from_compacting() -> None:
    from vllm.distributed import get_pp_group

    from vllm_medusa.compaction import PathCompactor

    original = PathCompactor.compact

    def compact(self, *args):
        if get_pp_group().is_last_rank:
            original(self, *args)

    PathCompactor.compact = compact


def _let_rank_1_draft_something_else() -> None:
    from vllm.distributed import get_tp_group

    from vllm_medusa.proposer import MedusaProposer

    original = MedusaProposer.draft

    def draft(self, *args, **kwargs):
        return original(self, *args, **kwargs) + get_tp_group().rank_in_group

    MedusaProposer.draft = draft


def _take_heads_from_rank_1() -> None:
    from vllm.distributed import get_world_group

    from vllm_medusa import proposer

    original = proposer.load_heads

    def load_heads(path, **kwargs):
        if get_world_group().rank == 1:
            path = "/nowhere/heads"
        return original(path, **kwargs)

    proposer.load_heads = load_heads


def _let_rank_1_die() -> None:
    from vllm.distributed import get_world_group

    from vllm_medusa.tree_batch import TreeBatch

    original, steps = TreeBatch.begin_step, []

    def begin_step(self, input_batch):
        steps.append(1)
        if len(steps) == 5 and get_world_group().rank == 1:
            os._exit(1)
        original(self, input_batch)

    TreeBatch.begin_step = begin_step
