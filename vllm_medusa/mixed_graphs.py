"""CUDA graphs for steps in which a prompt is computed beside trees.

vLLM has full graphs for uniform decode batches, or for batches of any mix, not for both; a mixed
batch runs layer by layer beside its own. Two attention calls a layer then keep the host busy for
longer than the GPU: 16.5 ms for 30 layers on an H100's host, for 8.4 ms of kernels, in 16 % of the
steps of eight requests at once and 40 % of those of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_medusa.attention_backend import TreeAttentionMetadataBuilder
from vllm_medusa.vllm_seams import add_full_graphs

# Rows of a graph are a multiple of it: on average 16 rows too many, 3 % of a full batch's.
STEP = 32
# Of vLLM's largest graph. Trees alone fill half of that one, so that prompts of 768 rows fit.
LARGEST = 2
# Rows per request at least. Every program of a request without rows costs a little, so that
# batches of few long requests have graphs of their own.
ROWS_PER_REQUEST = (8, 2)


def mixed_descriptors(
    largest: int, max_num_reqs: int, lora_cases: Sequence[int]
) -> Iterator[BatchExecutionDescriptor]:
    """Graphs of up to ``largest`` rows for batches of any mix, in the order to try them.

    Examples
    --------
    >>> [(one.num_tokens, one.num_reqs) for one in mixed_descriptors(64, 10, [0])]
    [(32, 4), (32, 10), (64, 8), (64, 10)]
    """
    for num_tokens in range(STEP, largest + 1, STEP):
        sizes = {min(max_num_reqs, num_tokens // rows) for rows in ROWS_PER_REQUEST}
        for num_reqs in sorted(sizes):
            # One request alone would be captured as a uniform batch.
            if num_reqs < 2:
                continue
            for case in lora_cases:
                yield BatchExecutionDescriptor(
                    CUDAGraphMode.FULL, num_tokens, num_reqs, num_active_loras=case
                )


def is_mixed(descriptor: BatchExecutionDescriptor) -> bool:
    """Whether a step runs one of :func:`mixed_descriptors`."""
    return (
        descriptor.cg_mode == CUDAGraphMode.FULL
        and descriptor.uniform_token_count is None
        and descriptor.max_query_len is None
    )


def add_mixed_graphs(runner: Any) -> None:
    """Add them to those that vLLM is about to capture, where they can serve.

    That is with vLLM's default mode, on FlashAttention 3, whose calls in a graph take any batch,
    and without data parallelism, under which idle ranks would replay them for dummy batches.

    Parameters
    ----------
    runner : TreeRunnerMixin
        With its cache and graph manager, before the capture.
    """
    manager = runner.cudagraph_manager
    builders = [
        builder
        for groups in runner.attn_groups
        for group in groups
        for builder in group.metadata_builders
    ]
    support = FlashAttentionMetadataBuilder.get_cudagraph_support
    can_serve = (
        manager.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
        and runner.dp_size == 1
        and all(
            isinstance(builder, TreeAttentionMetadataBuilder)
            and support(runner.vllm_config, builder.kv_cache_spec) == AttentionCGSupport.ALWAYS
            for builder in builders
        )
    )
    if can_serve:
        of_vllm = runner.compilation_config.max_cudagraph_capture_size
        largest = min(LARGEST * of_vllm, runner.max_num_tokens)
        made = mixed_descriptors(largest, runner.max_num_reqs, manager.lora_capture_cases)
        add_full_graphs(manager, list(made))
        _make_room(runner, largest)


def _make_room(runner: Any, num_rows: int) -> None:
    """Allocate the graphs' common output, which vLLM would make as large as its own largest."""
    manager, model_config = runner.cudagraph_manager, runner.model_config
    if manager.is_last_pp_rank:
        manager.hidden_states = torch.empty(
            max(num_rows, runner.compilation_config.max_cudagraph_capture_size),
            model_config.get_hidden_size(),
            dtype=model_config.dtype,
            device=runner.device,
        )
    else:
        manager.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=model_config.dtype, device=runner.device
        )
