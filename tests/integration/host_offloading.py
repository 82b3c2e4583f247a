"""vLLM's KV offloading with copies that a CPU can make: its own transfers need a GPU.

Scheduling, block keys, the manager and the connector are vLLM's; only bytes are moved here.
"""

from __future__ import annotations

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

# Calls of get_finished after which a late transfer is made.
LATE = 3


class HostOffloadingWorker(OffloadingWorker):
    """Makes every other transfer late, as a busy copy engine does.

    vLLM holds a store's blocks until it is told that the store has ended, so their rows may
    not change between its submission and then.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int):
        self.caches = [cache.tensor for cache in kv_caches.tensors]
        self.refs = kv_caches.group_data_refs
        self.chunks = [cache.new_empty(num_chunks, cache.shape[1]) for cache in self.caches]
        self.waiting: dict[int, tuple] = {}  # job -> (turns left, transfer)
        self.finished: list[TransferResult] = []

    def _copy(self, target: list, source: list, pages: GPULoadStoreSpec, to: list, of: list):
        """Pages ``of`` the source become pages ``to`` of the target, group by group."""
        first = 0
        for refs, count in zip(self.refs, pages.group_sizes, strict=True):
            part = slice(first, first + count)
            for index in {ref.tensor_idx for ref in refs}:
                target[index][to[part]] = source[index][of[part]]
            first += count

    def _submit(self, job_id: int, *transfer) -> bool:
        if job_id % 2:
            self.waiting[job_id] = (LATE, transfer)
        else:
            self._finish(job_id, transfer)
        return True

    def _finish(self, job_id: int, transfer: tuple) -> None:
        self._copy(*transfer)
        self.finished.append(TransferResult(job_id, success=True))

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """Cache to host."""
        to, of = (torch.as_tensor(spec.block_ids).long() for spec in (dst_spec, src_spec))
        return self._submit(job_id, self.chunks, self.caches, src_spec, to, of)

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec
    ) -> bool:
        """Host to cache."""
        to, of = (torch.as_tensor(spec.block_ids).long() for spec in (dst_spec, src_spec))
        return self._submit(job_id, self.caches, self.chunks, dst_spec, to, of)

    def get_finished(self) -> list[TransferResult]:
        """What has ended since the last call."""
        for job_id, (turns, transfer) in list(self.waiting.items()):
            self.waiting[job_id] = (turns - 1, transfer)
            if turns == 1:
                self.wait({job_id})
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Make these transfers now."""
        for job_id in job_ids & self.waiting.keys():
            self._finish(job_id, self.waiting.pop(job_id)[1])


class HostOffloadingSpec(CPUOffloadingSpec):
    """``spec_name`` of the offloading connector's configuration."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> HostOffloadingWorker:
        """The worker above in place of CUDA's."""
        if self.blocks_per_chunk != 1:
            raise ValueError(f"blocks_per_chunk={self.blocks_per_chunk}, expected 1")
        return HostOffloadingWorker(kv_caches, self.num_chunks)
