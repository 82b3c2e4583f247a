"""Trees chosen at every step: whose tables they go to, how deep they count, what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_medusa.config import MedusaOptions
from vllm_medusa.dynamic_tree import DynamicDrafter
from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.request_options import keeps_start_up_tree
from vllm_medusa.scheduler import TreeSchedulerMixin
from vllm_medusa.start_choices import resolve_tree
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_batch import TreeBatch

START_UP = TokenTree.from_paths([[0], [1], [0, 0], [2], [0, 1]])


def parents(batch: TreeBatch, slot: int) -> list[int]:
    return batch.parents[slot].tolist()


def test_each_request_gets_its_own_tree():
    """A sure request a chain, an unsure one a star, one that keeps its tree the start-up tree."""
    batch = TreeBatch(START_UP, 6, torch.device("cpu"))
    drafter = DynamicDrafter(batch, num_heads=5, vocab_size=40)
    for slot in (4, 0):
        batch.keep_tree(slot, False)
    logits = torch.zeros(4, 5, 40)
    logits[:, :, 7] = 30.0
    logits[1] = 0.0
    out = torch.zeros(4, 5, dtype=torch.int64)
    drafter.draft(out, logits, torch.tensor([4, 0, 2, -1]), None)
    assert parents(batch, 4) == [-1, 0, 1, 2, 3, 4]
    assert out[0].tolist() == [7] * 5
    assert parents(batch, 0) == [-1, 0, 0, 0, 0, 0]
    assert out[1].tolist() == [0, 1, 2, 3, 4]
    for slot in (1, 2, 3, 5):
        assert parents(batch, slot) == list(START_UP.parents)
    # Ranks 0 0 0 1 of heads 1 1 2 ..: token 7, then the lowest of the others.
    assert out[2].tolist() == out[3].tolist() == [7, 0, 7, 1, 0]
    batch.keep_tree(4, True)
    drafter.draft(out, logits, torch.tensor([4, 0, 2, -1]), None)
    assert parents(batch, 4) == list(START_UP.parents)
    assert batch.masks[4].tolist() == START_UP.mask_words().tolist()
    assert batch.depths[4].tolist() == list(START_UP.depths)


def test_heads_of_a_vocabulary_subset():
    batch = TreeBatch(START_UP, 2, torch.device("cpu"))
    batch.keep_tree(1, False)
    drafter = DynamicDrafter(batch, num_heads=2, vocab_size=8)
    logits = torch.zeros(1, 2, 8)
    logits[0, 0, 3], logits[0, 1, 5] = 9.0, 9.0
    out = torch.zeros(1, 5, dtype=torch.int64)
    drafter.draft(out, logits, torch.tensor([1]), torch.arange(100, 108)[None])
    assert out[0, :2].tolist() == [103, 105]


def params(**fields) -> SimpleNamespace:
    stock = {
        "structured_outputs": None, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "bad_words": None,
    }  # fmt: skip
    return SimpleNamespace(**stock | fields)


@pytest.mark.parametrize(
    "fields",
    [{"structured_outputs": {"regex": "a"}}, {"repetition_penalty": 1.1}, {"bad_words": ["x"]}],
    ids=lambda fields: next(iter(fields)),
)
def test_requests_that_the_host_lays_out_keep_the_tree(fields):
    assert keeps_start_up_tree(params(**fields))
    assert not keeps_start_up_tree(params())


class VllmScheduler:
    """Stands below the mixin."""

    def __init__(self, vllm_config, *args):
        self.log_stats = True
        self.requests = {
            "free": SimpleNamespace(sampling_params=params()),
            "penalised": SimpleNamespace(sampling_params=params(presence_penalty=0.5)),
        }


class Scheduler(TreeSchedulerMixin, VllmScheduler):
    """The mixin without vLLM's own scheduler."""


def scheduler(dynamic: bool, lookup: int = 0) -> Scheduler:
    config = SimpleNamespace(
        token_tree=START_UP, dynamic_tree=dynamic, deepest_path=max(4, lookup), node_frequencies=()
    )
    return Scheduler(SimpleNamespace(speculative_config=config))


@pytest.mark.parametrize(
    ("dynamic", "request_id", "depths"),
    [
        (False, "free", [0, 1, 1, 2, 2, 2]),
        (True, "free", [0, 1, 2, 3, 4, 4]),
        (True, "penalised", [0, 1, 1, 2, 2, 2]),
    ],
)
def test_statistics_count_the_depth_that_so_many_nodes_can_have(dynamic, request_id, depths):
    for nodes, depth in enumerate(depths[1:], start=1):
        stats = scheduler(dynamic).make_spec_decoding_stats(None, nodes, 1, None, request_id)
        assert stats.num_draft_tokens == depth
        assert len(stats.num_accepted_tokens_per_pos) == (4 if dynamic else 2)


def test_statistics_count_what_the_history_may_propose():
    stats = scheduler(True, lookup=16).make_spec_decoding_stats(None, 5, 5, None, "free")
    assert stats.num_draft_tokens == 5
    assert list(stats.num_accepted_tokens_per_pos) == [1] * 5


SPEC = HeadSpec(3, 1, 8, vocab_size=200, dtype=torch.float32)


def resolve(nodes: int = 63, ranks: int = 1, stages: int = 1, spec: HeadSpec = SPEC, **options):
    parallel = SimpleNamespace(tensor_parallel_size=ranks, pipeline_parallel_size=stages)
    asked = MedusaOptions(model="HEADS", **options)
    return resolve_tree(asked, nodes, spec, spec.num_heads, parallel)


SMALL = HeadSpec(1, 1, 8, vocab_size=20, dtype=torch.float32)
CANNOT = {
    "tensor parallel": ({"ranks": 2}, "tensor_parallel_size=2"),
    "pipeline parallel": ({"stages": 3}, "pipeline_parallel_size=3"),
    "too many nodes": ({"nodes": 64}, "more than the 63 nodes"),
    "other attention": ({"attention": "xformers"}, "attention='xformers' knows one tree"),
    "too few tokens": ({"spec": SMALL}, "1 heads over 20 tokens fill fewer than 63 nodes"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_choose_has_one_tree_and_is_refused_if_asked_to(case):
    where, reason = CANNOT[case]
    assert resolve(**where).tree == "static"
    with pytest.raises(ValueError, match=f"tree='dynamic': .*{reason}"):
        resolve(**where, tree="dynamic")
    with pytest.raises(ValueError, match=f"prompt_lookup=8 needs trees .*{reason}"):
        resolve(**where, prompt_lookup=8)
    assert resolve(**where, prompt_lookup=0).lookup_length == 0


def test_trees_are_chosen_unless_one_is_given():
    sequential = dataclasses.replace(SMALL, sequential=True)
    for spec in (SPEC, sequential):
        assert resolve(spec=spec).tree == resolve(spec=spec, tree="dynamic").tree == "dynamic"
    assert resolve(prompt_lookup=8).lookup_length == 8
    for tree in ("static", "mc_sim_7b_63", [2, 1], [[0]]):
        assert resolve(tree=tree).tree == tree
        assert not resolve(tree=tree).dynamic_tree


def test_fewer_ranks_than_nodes_are_refused():
    batch = TreeBatch(START_UP, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="1 heads over 4 tokens fill fewer than 5 nodes"):
        DynamicDrafter(batch, num_heads=1, vocab_size=4)
