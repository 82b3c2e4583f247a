"""What vLLM's CPU communicator lacks for data-parallel experts."""

from __future__ import annotations

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class ExpertCommunicator(CpuCommunicator):
    """vLLM's for CPUs with the two collectives that it lacks: without them no mixture of experts
    runs data-parallel on a CPU, with or without speculation.
    """

    def all_gatherv(self, input_, dim=0, sizes=None):
        """Rows of all ranks, which hold ``sizes`` of them."""
        if isinstance(input_, list):
            return [self.all_gatherv(part, dim, sizes) for part in input_]
        sizes = sizes or [input_.shape[0]] * self.world_size
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=self.device_group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatterv(self, input_, dim=-1, sizes=None):
        """This rank's rows of the sum over ranks."""
        summed = input_.clone()
        torch.distributed.all_reduce(summed, group=self.device_group)
        sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
        first = sum(sizes[: self.rank_in_group])
        return summed[first : first + sizes[self.rank_in_group]]
