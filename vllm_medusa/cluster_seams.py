"""Names of vLLM's cluster code that this project relies on, and why; beside ``vllm_seams.py``.

Made for vLLM 0.32.

==============================================  =====================================
name                                            why there is no other way
==============================================  =====================================
ray_executor_v2.initialize_ray_cluster          after it the workers' nodes are known,
ray_executor.initialize_ray_cluster             before their first process; an executor class
                                                of our own would not be "ray" to vLLM
==============================================  =====================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_medusa.import_watch import after_import

RAY_EXECUTORS = ("vllm.v1.executor.ray_executor_v2", "vllm.v1.executor.ray_executor")


def after_ray_placement(check: Callable[[Any], None]) -> None:
    """Call ``check(parallel_config)`` once vLLM has chosen the nodes of its Ray workers."""

    def wrap(module: Any) -> None:
        original = module.initialize_ray_cluster
        if getattr(original, "_vllm_medusa", False):
            return

        @functools.wraps(original)
        def initialize_ray_cluster(parallel_config, *args, **kwargs):
            original(parallel_config, *args, **kwargs)
            check(parallel_config)

        initialize_ray_cluster._vllm_medusa = True
        module.initialize_ray_cluster = initialize_ray_cluster

    for name in RAY_EXECUTORS:
        after_import(name, wrap)
