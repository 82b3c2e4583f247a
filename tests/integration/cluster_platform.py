"""vLLM's CPU platform with a name for what Ray counts, and async scheduling on request."""

from __future__ import annotations

import os

from cluster_plugin import ASYNC_VARIABLE, EXPERTS_VARIABLE
from vllm.platforms.cpu import CpuPlatform


class ClusterCpuPlatform(CpuPlatform):
    """Counts the GPUs that a test's Ray cluster says it has."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """With what data-parallel experts need, where a test asks for it."""
        if os.environ.get(EXPERTS_VARIABLE):
            return "cluster_communicator.ExpertCommunicator"
        return super().get_device_communicator_cls()

    @classmethod
    def check_and_update_config(cls, vllm_config):
        """As on a CPU, but pipeline stages need async scheduling under speculation."""
        super().check_and_update_config(vllm_config)
        if os.environ.get(ASYNC_VARIABLE):
            vllm_config.scheduler_config.async_scheduling = True
