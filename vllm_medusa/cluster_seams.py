"""Names of vLLM's cluster code that this project relies on, and why; beside ``vllm_seams.py``.

Made for vLLM 0.32.

==============================================  =====================================
name                                            why there is no other way
==============================================  =====================================
ray_executor_v2.initialize_ray_cluster          after it the workers' nodes are known,
ray_executor.initialize_ray_cluster             before their first process; an executor class
                                                of our own would not be "ray" to vLLM
engine.utils.CoreEngineActorManager             the same for data parallelism on Ray, whose
  .create_dp_placement_groups                   engines run on those nodes themselves
==============================================  =====================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_medusa.import_watch import after_import

RAY_EXECUTORS = ("vllm.v1.executor.ray_executor_v2", "vllm.v1.executor.ray_executor")
RAY_REPLICAS = "vllm.v1.engine.utils"


def after_ray_placement(check: Callable[[Any, list], None]) -> None:
    """Call ``check`` once vLLM has chosen the nodes of its Ray workers.

    Parameters
    ----------
    check : callable
        Takes the parallel config and the placement groups; whatever it raises ends the start.
    """

    def wrap_executor(module: Any) -> None:
        original = module.initialize_ray_cluster
        if getattr(original, "_vllm_medusa", False):
            return

        @functools.wraps(original)
        def initialize_ray_cluster(parallel_config, *args, **kwargs):
            original(parallel_config, *args, **kwargs)
            check(parallel_config, [parallel_config.placement_group])

        initialize_ray_cluster._vllm_medusa = True
        module.initialize_ray_cluster = initialize_ray_cluster

    def wrap_replicas(module: Any) -> None:
        manager = module.CoreEngineActorManager
        original = manager.create_dp_placement_groups
        if getattr(original, "_vllm_medusa", False):
            return

        @functools.wraps(original)
        def create_dp_placement_groups(vllm_config):
            placement_groups, local_ranks = original(vllm_config)
            check(vllm_config.parallel_config, placement_groups)
            return placement_groups, local_ranks

        create_dp_placement_groups._vllm_medusa = True
        manager.create_dp_placement_groups = staticmethod(create_dp_placement_groups)

    for name in RAY_EXECUTORS:
        after_import(name, wrap_executor)
    after_import(RAY_REPLICAS, wrap_replicas)
