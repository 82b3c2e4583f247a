"""The CUDA backend's metadata: which rows go to the tree kernel, which to FlashAttention."""

from __future__ import annotations

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


def test_mixed_batch_splits_behind_the_tree_requests(builder):
    builder.tree_batch.num_tree_reqs = 2
    common = batch([8, 4, 1, 40], [10, 20, 30, 0])
    meta = builder.build(0, common)
    assert (meta.num_tree_reqs, meta.num_tree_tokens) == (2, 12)
    assert meta.max_query_len == 8
    kind, rest = meta.rest
    assert kind == "flash"
    assert rest.query_start_loc.tolist() == [0, 1, 41]
    assert rest.query_start_loc_cpu.tolist() == [0, 1, 41]
    assert rest.seq_lens.tolist() == [31, 40]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (2, 41, 40)
    assert rest.block_table_tensor.tolist() == common.block_table_tensor[2:].tolist()
    assert rest.slot_mapping.tolist() == list(range(12, 53))
    assert rest.is_prefilling.tolist() == [False, True]


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


def test_masks_are_the_persistent_buffer_that_graphs_read(builder):
    builder.tree_batch.num_tree_reqs = 1
    meta = builder.build(0, batch([8], [0]))
    assert meta.masks is builder.tree_batch.step_masks
