"""The CUDA backend's metadata: which rows go to the tree kernel, which to FlashAttention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.vllm
W = 8  # rows of the largest tree
CUT = 3  # rows that a schedule cuts it to


@pytest.fixture
def builder(monkeypatch):
    from vllm.v1.attention.backends import flash_attn

    from vllm_medusa.attention_backend import TreeAttentionMetadataBuilder
    from vllm_medusa.tree import TokenTree
    from vllm_medusa.tree_batch import TreeBatch

    made = object.__new__(TreeAttentionMetadataBuilder)
    made.rest_builder = object.__new__(flash_attn.FlashAttentionMetadataBuilder)
    made.model_config = SimpleNamespace(max_model_len=512)
    chain = TokenTree.from_paths([[0] * depth for depth in range(1, W)])
    made.tree_batch = TreeBatch(chain, 8, torch.device("cpu"), row_counts=(1, CUT, W))
    monkeypatch.setattr(
        flash_attn.FlashAttentionMetadataBuilder,
        "build",
        lambda self, prefix, common, fast_build=False: ("flash", common),
    )
    return made


def batch(query_lens: list[int], contexts: list[int]):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    num_reqs, tokens = len(query_lens), int(starts[-1])
    seq_lens = torch.tensor(query_lens, dtype=torch.int32) + torch.tensor(
        contexts, dtype=torch.int32
    )
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=num_reqs,
        num_actual_tokens=tokens,
        max_query_len=max(query_lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.arange(num_reqs * 4, dtype=torch.int32).view(num_reqs, 4),
        slot_mapping=torch.arange(tokens),
        positions=torch.arange(tokens),
        is_prefilling=torch.tensor([q > W for q in query_lens]),
    )


def test_no_drafts_is_flash_attention_alone(builder):
    common = batch([1, 1, 30], [5, 6, 0])
    assert builder.build(0, common) == ("flash", common)


def test_pure_verification_has_no_rest(builder):
    builder.tree_batch.num_tree_reqs = 3
    meta = builder.build(0, batch([8, 8, 5], [10, 20, 30]))
    assert (meta.num_tree_reqs, meta.num_tree_tokens, meta.rest) == (3, 21, None)
    assert meta.max_query_len == 8


def give_trees(builder, common, num_tree_reqs: int) -> None:
    """What the runner does before metadata are built."""
    builder.tree_batch.num_tree_reqs = num_tree_reqs
    starts = common.query_start_loc
    builder.tree_batch.split_rows(starts, int(starts[num_tree_reqs]))


def test_each_kernel_has_no_rows_for_the_requests_of_the_other(builder):
    common = batch([8, 4, 1, 40], [10, 20, 30, 0])
    give_trees(builder, common, 2)
    meta = builder.build(0, common)
    assert (meta.num_tree_reqs, meta.num_tree_tokens) == (2, 12)
    assert meta.query_start_loc is common.query_start_loc
    assert meta.max_query_len == 8
    kind, rest = meta.rest
    assert kind == "flash"
    assert rest.query_start_loc.tolist() == [12, 12, 12, 13, 53]
    assert rest.query_start_loc_cpu.tolist() == [12, 12, 12, 13, 53]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (4, 53, 40)
    assert rest.seq_lens is common.seq_lens
    assert rest.block_table_tensor is common.block_table_tensor
    assert rest.slot_mapping is common.slot_mapping


def test_plain_decodes_beside_trees_are_not_said_to_have_a_row_in_every_request(builder):
    common = batch([8, 1, 1], [10, 20, 30])
    give_trees(builder, common, 1)
    _, rest = builder.build(0, common).rest
    assert rest.max_query_len == 2


MIXES = {
    "trees and a prompt": ([8, 3, 30], 2),
    "trees of different sizes": ([8, 3, 5], 3),
    "prompts": ([20, 30, 7], 0),
    "trees and padded requests": ([8, 8, 30, 0, 0], 2),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_mixed_graph_is_told_the_same_at_capture_and_replay(builder, name):
    query_lens, num_tree_reqs = MIXES[name]
    common = batch(query_lens, [0] * len(query_lens))
    num_rows, num_reqs = common.num_actual_tokens, common.num_reqs
    captured = builder.build_for_cudagraph_capture(common.replace(max_query_len=num_rows))
    trees = builder.tree_batch
    assert trees.tree_starts[: num_reqs + 1].tolist() == [0] * (num_reqs + 1)
    assert trees.rest_starts[: num_reqs + 1].tolist() == common.query_start_loc.tolist()

    give_trees(builder, common, num_tree_reqs)
    trees.in_mixed_graph = True
    replayed = builder.build(0, common)
    behind = int(common.query_start_loc[num_tree_reqs])
    starts = common.query_start_loc.tolist()
    assert trees.tree_starts[: num_reqs + 1].tolist() == [min(at, behind) for at in starts]
    assert trees.rest_starts[: num_reqs + 1].tolist() == [max(at, behind) for at in starts]
    for meta in (captured, replayed):
        assert (meta.num_tree_reqs, meta.num_tree_tokens) == (num_reqs, num_rows)
        assert (meta.max_query_len, meta.query_start_loc) == (W, trees.tree_starts)
        _, rest = meta.rest
        assert (rest.num_reqs, rest.num_actual_tokens) == (num_reqs, num_rows)
        assert (rest.max_query_len, rest.max_seq_len) == (num_rows, 512)
        assert rest.query_start_loc.data_ptr() == trees.rest_starts.data_ptr()


def test_padded_requests_of_a_full_graph_belong_to_the_launch(builder):
    builder.tree_batch.num_tree_reqs = 2
    common = batch([8, 8, 0, 0], [10, 20, 0, 0])
    meta = builder.build(0, common)
    assert (meta.num_tree_reqs, meta.num_tree_tokens, meta.rest) == (4, 16, None)


def test_capture_takes_the_tree_kernel_for_full_uniform_batches_only(builder):
    captured = builder.build_for_cudagraph_capture(batch([8, 8], [0, 0]))
    assert (captured.num_tree_reqs, captured.rest) == (2, None)
    cut = builder.build_for_cudagraph_capture(batch([CUT, CUT], [0, 0]))
    assert (cut.num_tree_reqs, cut.max_query_len, cut.rest) == (2, CUT, None)
    assert builder.build_for_cudagraph_capture(batch([1, 1], [0, 0]))[0] == "flash"
    assert builder.build_for_cudagraph_capture(batch([4, 4], [0, 0]))[0] == "flash"
    assert builder.build_for_cudagraph_capture(batch([8, 3], [0, 0]))[0] == "flash"
    alone = builder.build_for_cudagraph_capture(batch([8], [0]))
    assert (alone.num_tree_reqs, alone.rest) == (1, None)


def test_masks_are_the_persistent_buffer_that_graphs_read(builder):
    builder.tree_batch.num_tree_reqs = 1
    meta = builder.build(0, batch([8], [0]))
    assert meta.masks is builder.tree_batch.step_masks
