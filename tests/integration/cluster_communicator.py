"""What vLLM's CPU build lacks for data-parallel experts, with or without speculation.

Its communicator has no ``all_gatherv`` and ``reduce_scatterv``, and its experts take the
model's numbers of experts for their own: a rank that holds half of them reads beyond its weights.
"""

from __future__ import annotations

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class ExpertCommunicator(CpuCommunicator):
    """vLLM's for CPUs, with both collectives; puts the experts right besides."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        let_experts_know_their_numbers()

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


def let_experts_know_their_numbers() -> None:
    """Translate the router's choices into a rank's own experts; others weigh nothing."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply
    if getattr(original, "translates", False):
        return

    def apply(self, *, topk_weights, topk_ids, expert_map, **given):
        if expert_map is not None:
            own = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(own < 0, 0)
            topk_ids = own.clamp(min=0).to(topk_ids.dtype)
        return original(
            self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **given
        )

    apply.translates = True
    CPUUnquantizedExperts.apply = apply
