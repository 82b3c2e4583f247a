"""The tree-verifying runner on NVIDIA GPUs, where mixed batches have graphs too."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_medusa.mixed_graphs import add_mixed_graphs, is_mixed
from vllm_medusa.runner import TreeRunnerMixin


class MedusaModelRunner(TreeRunnerMixin, GPUModelRunner):
    """The V2 runner on an NVIDIA GPU."""

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: Any,
        batch_desc: BatchExecutionDescriptor,
        num_active_loras: int,
    ) -> InputBatch:
        """Fill the input buffers; remember what kind of graph will read them."""
        self.tree_batch.in_mixed_graph = is_mixed(batch_desc)
        return super().prepare_inputs(
            scheduler_output, batch_req_state, batch_desc, num_active_loras
        )

    def initialize_kv_cache(self, *args, **kwargs) -> None:
        """Allocate the cache; have vLLM capture graphs of mixed batches, too."""
        super().initialize_kv_cache(*args, **kwargs)
        add_mixed_graphs(self)
