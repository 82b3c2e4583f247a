"""Which graph a batch takes, once those of mixed batches are among vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.vllm
MAX_REQS = 16


@pytest.fixture
def manager():
    """vLLM's manager of uniform graphs of 8 and 1 rows and piecewise ones, up to 64 rows."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    made = object.__new__(CudaGraphManager)
    made.vllm_config = SimpleNamespace(speculative_config=None)
    made.compilation_config = SimpleNamespace(
        cudagraph_capture_sizes=[1, 8, 16, 32, 64], max_cudagraph_capture_size=64
    )
    made.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    made.vllm_config.cache_config = SimpleNamespace(use_kda_recoverssm=False)
    made.max_num_reqs, made.decode_query_len = MAX_REQS, 8
    made.varlen_decode, made.ubatch_runner = False, None
    made.lora_capture_cases, made._lora_dispatch_map, made._max_lora_case = [0], {}, 0
    made._candidates, made._capture_descs = {}, {}
    made._init_candidates()
    made._graphs_captured, made.is_last_pp_rank = True, True
    return made


@pytest.fixture
def runner(manager, monkeypatch):
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    from vllm_medusa.attention_backend import TreeAttentionMetadataBuilder

    monkeypatch.setattr(
        FlashAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.ALWAYS
    )
    builder = object.__new__(TreeAttentionMetadataBuilder)
    builder.kv_cache_spec = None
    return SimpleNamespace(
        cudagraph_manager=manager,
        vllm_config=manager.vllm_config,
        attn_groups=[[SimpleNamespace(metadata_builders=[builder])]],
        dp_size=1,
        compilation_config=manager.compilation_config,
        max_num_tokens=100,
        model_config=SimpleNamespace(dtype=torch.bfloat16, get_hidden_size=lambda: 12),
        device=torch.device("cpu"),
        max_num_reqs=MAX_REQS,
    )


def taken(manager, num_reqs: int, num_tokens: int, uniform: int | None):
    from vllm_medusa.mixed_graphs import is_mixed

    found = manager.dispatch(num_reqs, num_tokens, uniform, 0)
    kind = "mixed" if is_mixed(found) else found.cg_mode.name
    return kind, found.num_tokens, found.num_reqs


def test_mixed_batches_take_full_graphs(runner):
    from vllm_medusa.mixed_graphs import add_mixed_graphs

    manager = runner.cudagraph_manager
    assert taken(manager, 3, 40, None) == ("PIECEWISE", 64, None)
    add_mixed_graphs(runner)
    assert taken(manager, 3, 40, None) == ("mixed", 64, 8)
    # Many short requests: the graph with more of them.
    assert taken(manager, 12, 40, None) == ("mixed", 64, 16)
    # More than fit beside so few rows: as vLLM has it.
    assert taken(manager, 17, 30, None) == ("PIECEWISE", 32, None)
    # Beyond vLLM's largest graph, and beyond ours.
    assert taken(manager, 3, 70, None) == ("mixed", 96, 12)
    assert taken(manager, 3, 97, None)[0] == "NONE"


def test_uniform_batches_keep_their_graphs(runner):
    from vllm_medusa.mixed_graphs import add_mixed_graphs

    add_mixed_graphs(runner)
    for num_reqs, rows in ((1, 8), (3, 8), (8, 8)):
        kind, tokens, reqs = taken(runner.cudagraph_manager, num_reqs, num_reqs * rows, rows)
        assert (kind, tokens) == ("FULL", reqs * rows)


def test_graphs_are_captured_from_the_largest_and_fit_their_output(runner):
    from vllm.config.compilation import CUDAGraphMode

    from vllm_medusa.mixed_graphs import add_mixed_graphs

    add_mixed_graphs(runner)
    captured = runner.cudagraph_manager._capture_descs[CUDAGraphMode.FULL]
    sizes = [one.num_tokens for one in captured]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 96  # multiples of 32 up to max_num_batched_tokens
    assert len(set(captured)) == len(captured)
    output = runner.cudagraph_manager.hidden_states
    assert (output.shape[1], output.dtype) == (12, torch.bfloat16)
    assert output.shape[0] >= sizes[0]


CASES_WITHOUT = {
    "data parallel": ("dp_size", 2),
    "other attention": ("attn_groups", [[SimpleNamespace(metadata_builders=[object()])]]),
}


@pytest.mark.parametrize("name", CASES_WITHOUT)
def test_no_mixed_graphs(runner, name):
    from vllm_medusa.mixed_graphs import add_mixed_graphs

    setattr(runner, *CASES_WITHOUT[name])
    add_mixed_graphs(runner)
    assert taken(runner.cudagraph_manager, 3, 40, None) == ("PIECEWISE", 64, None)


def test_no_mixed_graphs_on_flash_attention_2(runner, monkeypatch):
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    from vllm_medusa.mixed_graphs import add_mixed_graphs

    monkeypatch.setattr(
        FlashAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.UNIFORM_BATCH
    )
    add_mixed_graphs(runner)
    assert taken(runner.cudagraph_manager, 3, 40, None) == ("PIECEWISE", 64, None)


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL"])
def test_other_modes_are_left_alone(runner, mode):
    from vllm.config.compilation import CUDAGraphMode

    from vllm_medusa.mixed_graphs import add_mixed_graphs

    before = dict(runner.cudagraph_manager._candidates)
    runner.cudagraph_manager.cudagraph_mode = CUDAGraphMode[mode]
    add_mixed_graphs(runner)
    assert runner.cudagraph_manager._candidates == before


def test_graphs_behind_the_draw_count_requests_alone(runner, manager, monkeypatch):
    from vllm_medusa import drawn_step

    monkeypatch.setattr(drawn_step, "CudaGraphManager", lambda *args: manager)
    # No size of vLLM's, and the batch of a server that is full.
    runner.max_num_reqs = 21
    runner.speculator = SimpleNamespace(drawn_graphs=None)
    step = drawn_step.DrawnStep(SimpleNamespace(runner=runner))
    assert step._graph(3) is None
    runner.speculator.drawn_graphs = step.make_graphs()
    assert [step._graph(n)[0] for n in (1, 2, 3, 9, 16, 17, 21)] == [1, 2, 4, 16, 16, 21, 21]
    assert step._graph(22) is None
    captured = [one.num_reqs for own in manager._capture_descs.values() for one in own]
    assert captured == [21, 16, 8, 4, 2, 1]
