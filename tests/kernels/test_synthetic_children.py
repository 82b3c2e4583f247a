"""The kernel that draws right children equals its twin, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_medusa.tree import TokenTree

pytestmark = pytest.mark.usefixtures("benchmarks")


def arguments(tree: TokenTree, requests: int, seed: int, device: torch.device) -> dict:
    """Cut and whole trees, some without a request and some rows without a draft."""
    from synthetic_children import child_ranges

    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> torch.Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    # Of a row's children the first is right in 0.4 of all cases, the next in 0.2, ..
    share = [float(np.prod([0.4 * 0.5**rank for rank in path])) for path in tree.paths]
    low, high = child_ranges(tree, tuple(share))
    counts = draw(1, tree.num_rows + 1, requests)
    num_logits, slots = int(counts.sum()), torch.randperm(requests + 3, generator=generator)
    tokens = draw(-1, 128_000, num_logits)
    made = {
        "out_tokens": torch.full((num_logits,), 7, dtype=torch.int32),
        "drawn": draw(0, 128_000, num_logits),
        "tokens": tokens.int(),
        "positions": draw(0, 2**20, num_logits),
        "cu_rows": torch.cat([torch.zeros(1), counts.cumsum(0)]).int(),
        "slots": torch.where(draw(0, 5, requests) == 0, -1, slots[:requests]),
        "seeds": draw(-(2**62), 2**62, requests + 3),
        "parents": torch.tensor(tree.parents, dtype=torch.int32).repeat(requests + 3, 1),
        "lowest": torch.tensor(low),
        "highest": torch.tensor(high),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


@pytest.mark.parametrize("widths", [[3], [5, 3, 1], [7, 4, 3]])
def test_kernel_equals_twin(widths, device):
    import synthetic_kernel
    from synthetic_children import reference

    made = arguments(TokenTree.from_widths(widths), 9, len(widths), device)
    twin = {name: tensor.clone() for name, tensor in made.items()}
    before = made["drawn"].clone()
    synthetic_kernel.launch(len(made["slots"]), made["parents"], tuple(made.values()))
    reference(*twin.values())
    assert torch.equal(made["out_tokens"], twin["out_tokens"])
    assert torch.equal(made["drawn"], twin["drawn"])
    assert not torch.equal(made["drawn"], before)
