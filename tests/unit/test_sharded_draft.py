"""Heads in parts: every rank drafts what whole heads draft on one GPU."""

from __future__ import annotations

import pytest
import torch
from thread_ranks import ThreadRanks
from torch import nn

from vllm_medusa import sharded_draft
from vllm_medusa.draft_vocabulary import cut_lm_head
from vllm_medusa.head_weights import TENSORS, HeadSpec, HeadWeights
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.kernels import draft_tree
from vllm_medusa.sharded_draft import even_slice, ids_of, shard_heads, sort_keys

pytestmark = pytest.mark.vllm

VOCAB, HIDDEN, HEADS, TOP = 50, 8, 3, 4
NODES = torch.tensor([0, 1, 3, 4, 5, 8, 11])  # head * TOP + rank


def make_weights(**fields) -> HeadWeights:
    """Random heads whose logits are small integers, so that many are equal and all are exact."""
    fields = {"num_heads": HEADS, "num_layers": 1, "hidden_size": HIDDEN, "vocab_size": VOCAB,
              "dtype": torch.float32, **fields}  # fmt: skip
    spec = HeadSpec(**fields)
    generator = torch.Generator().manual_seed(3)
    tensors = dict.fromkeys(TENSORS)
    for name, shape in spec.shapes.items():
        if shape is None:
            continue
        if name == "token_map":
            rows = [torch.randperm(VOCAB, generator=generator)[: shape[1]] for _ in range(shape[0])]
            tensors[name] = torch.stack(rows)
        elif name in ("weight", "bias"):
            # SiLU is exact where it is 0 or the number itself.
            tensors[name] = 128.0 * torch.randint(-1, 2, shape, generator=generator)
        else:
            tensors[name] = torch.randint(-1, 2, shape, generator=generator).float()
    return HeadWeights(spec, **tensors)


class FakeLmHead(nn.Module):
    """What the target's lm_head shows: this rank's rows, padded."""

    def __init__(self, whole: torch.Tensor, rank: int, world_size: int):
        super().__init__()
        share = -(-len(whole) // world_size) + 3
        first, last = min(rank * share, len(whole)), min((rank + 1) * share, len(whole))
        rows = torch.zeros(share, whole.shape[1])
        rows[: last - first] = whole[first:last]
        self.weight = nn.Parameter(rows)
        self.tp_size = world_size
        self.shard_indices = type("Shard", (), {})()
        self.shard_indices.org_vocab_start_index = first
        self.shard_indices.org_vocab_end_index = last


def fake_target(whole: torch.Tensor, rank: int, ranks: ThreadRanks, spoil: bool = False):
    """A target whose logits are gathered; ``spoil`` changes ids after that, as some models do."""

    class Processor(sharded_draft.LogitsProcessor):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, lm_head, hidden_states, embedding_bias=None, skip_gather=False):
            logits = hidden_states @ lm_head.weight.T
            if skip_gather:
                return logits
            logits = sharded_draft.tensor_model_parallel_all_gather(logits)
            return logits[:, : len(whole)]

    class Target(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = FakeLmHead(whole, rank, ranks.world_size)
            self.logits_processor = Processor()

        def compute_logits(self, hidden):
            logits = self.logits_processor(self.lm_head, hidden)
            if spoil:
                logits[:, 1] = 77.0
            return logits

    return Target()


def draft_whole(weights: HeadWeights, lm_head: torch.Tensor, size: int | None, hidden):
    """Drafts of one GPU."""
    target = nn.Module()
    target.lm_head = nn.Module()
    target.lm_head.weight = nn.Parameter(lm_head)
    heads = MedusaHeads.from_weights(cut_lm_head(weights, target, size))
    out = torch.empty(len(hidden), len(NODES), dtype=torch.int64)
    logits = heads.draft_logits(hidden, lambda x: x @ lm_head.T)
    draft_tree(out, logits, NODES, num_top=TOP, token_map=heads.token_map)
    return out


CASES = {
    "own": ({"own_lm_head": True, "bias": True}, None),
    "own, two layers": ({"own_lm_head": True, "num_layers": 2}, None),
    "own, no layers": ({"own_lm_head": True, "num_layers": 0}, None),
    "common": ({"own_lm_head": True, "common_lm_head": True}, None),
    "low rank": ({"own_lm_head": True, "lm_head_rank": 3}, None),
    "own, subset": ({"own_lm_head": True, "vocab_subset_size": 21}, None),
    "own, subset per head": (
        {"own_lm_head": True, "vocab_subset_size": 21, "vocab_subset_per_head": True},
        None,
    ),
    "fewer ids than ranks need": ({"own_lm_head": True, "vocab_subset_size": 5}, None),
    "shared": ({}, None),
    "shared, subset": ({"vocab_subset_size": 21}, None),
    "shared, draft vocabulary": ({}, 17),
}


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("case", CASES)
def test_ranks_draft_what_one_gpu_drafts(monkeypatch, case, world_size):
    fields, size = CASES[case]
    weights, ranks = make_weights(**fields), ThreadRanks(world_size)
    ranks.install(monkeypatch)
    lm_head = torch.randint(-1, 2, (VOCAB, HIDDEN)).float()
    # More rows than heads: the layout of the logits must not be guessed from a size.
    hidden = torch.randint(-1, 2, (5, HIDDEN)).float()
    expected = draft_whole(weights, lm_head, size, hidden)

    def draft(rank: int) -> torch.Tensor:
        target = fake_target(lm_head, rank, ranks)
        part = shard_heads(weights, target, size, torch.device("cpu"))
        part.allocate(len(hidden), TOP)
        out = torch.empty_like(expected)
        with torch.inference_mode():
            part.draft(out, hidden, NODES)
        held = part.heads.lm_head
        if held is not None and weights.spec.output_size > 2 * world_size:
            assert held.shape[1] < (size or weights.spec.output_size)
        return out

    for found in ranks.run(draft):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("fields", "spoil"),
    [({"vocab_subset_size": 21, "vocab_subset_per_head": True}, False), ({}, True)],
    ids=["a subset per head", "logits changed after the gather"],
)
def test_a_shared_lm_head_that_has_no_parts_is_gathered(monkeypatch, fields, spoil):
    weights, ranks = make_weights(**fields), ThreadRanks(2)
    ranks.install(monkeypatch)
    lm_head = torch.ones(VOCAB, HIDDEN)

    def shard(rank: int):
        target = fake_target(lm_head, rank, ranks, spoil)
        return shard_heads(weights, target, None, torch.device("cpu"))

    assert ranks.run(shard) == [None, None]


def test_keys_order_values_then_lower_ids():
    values = torch.tensor([-0.0, 0.0, float("nan"), -1.5, float("inf"), float("-inf"), 2.0, 2.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        keys = sort_keys(values.to(dtype), torch.arange(8))
        assert ids_of(keys.sort(descending=True).values).tolist() == [4, 6, 7, 0, 1, 3, 2, 5]
    assert ids_of(sort_keys(torch.zeros(1), torch.tensor([2**32 - 1]))).item() == 2**32 - 1


@pytest.mark.parametrize(("size", "world_size"), [(0, 2), (1, 4), (7, 3), (8, 8), (100, 7)])
def test_even_slices_cover_everything_once(size, world_size):
    parts = [range(size)[even_slice(size, rank, world_size)] for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(size))
