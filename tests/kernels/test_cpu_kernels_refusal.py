"""Kernels without a fall-back are refused in words; the fall-backs fit vLLM's signatures."""

import json
import os
import subprocess
import sys

import cpu_cases
import pytest

from vllm_medusa.cpu_kernels import refusal

SCRIPT = """
import inspect, json
import vllm.v1.worker.cpu.model_runner  # what a worker has imported by then
from vllm.triton_utils import dispatcher
from vllm_medusa.cpu_kernels.registry import FALLBACKS
from vllm_medusa.cpu_kernels.v2_runner import enable_v2_runner

kernels = {name: dispatcher._resolve_kernel(name) for name in FALLBACKS}
arguments = {name: list(inspect.signature(getattr(*kernel)).parameters)
             for name, kernel in kernels.items()}
own = {name: [argument for argument, kind in inspect.signature(fallback).parameters.items()
              if kind.kind is not inspect.Parameter.VAR_KEYWORD]
       for name, fallback in FALLBACKS.items()}
enabled = [enable_v2_runner(), enable_v2_runner()]
from vllm.v1.worker.gpu.sample import watermark
try:
    watermark._philox_gumbel_kernel[(1,)](1, vocab_size=2)
except RuntimeError as error:
    message = str(error)
refused = [name for name, (_, impl) in dispatcher._registry.items() if impl.__name__ == "refuse"]
print("RESULT" + json.dumps([arguments, own, enabled, message, refused]))
"""


@pytest.fixture(scope="module")
def facts() -> list:
    """Facts of a process that enables the V2 runner."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "VLLM_PLUGINS": ""}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads(process.stdout.rpartition("RESULT")[2])


@pytest.mark.vllm
@cpu_cases.needs_cpu_build
def test_fallbacks_take_the_kernels_arguments(facts: list) -> None:
    arguments, own, *_ = facts
    assert own == arguments


@pytest.mark.vllm
@cpu_cases.needs_cpu_build
def test_enabling_twice_is_enabling_once(facts: list) -> None:
    assert facts[2] == [True, True]


@pytest.mark.vllm
@cpu_cases.needs_cpu_build
def test_a_launch_without_fallback_names_feature_and_kernel(facts: list) -> None:
    message = facts[3]
    assert message.startswith("Watermarking (watermark_config) needs the Triton kernel vllm.v1")
    assert "._philox_gumbel_kernel" in message
    assert "Leave the feature out" in message


@pytest.mark.vllm
@cpu_cases.needs_cpu_build
def test_refused_and_covered_kernels_do_not_overlap(facts: list) -> None:
    arguments, *_, refused = facts
    assert refused
    assert not set(refused) & set(arguments)


@pytest.mark.parametrize(
    ("kernel", "cause"),
    [
        ("vllm.v1.worker.gpu.sample.batch_shard._pack_logprobs_kernel", "Batch-sharded sampling"),
        (
            "vllm.v1.worker.gpu.cp_utils._dcp_local_seq_lens_kernel",
            "Decode context parallelism (decode_context_parallel_size > 1)",
        ),
        ("vllm.v1.worker.gpu.novelty._new_kernel", "Module vllm.v1.worker.gpu.novelty"),
    ],
)
def test_cause_of(kernel: str, cause: str) -> None:
    assert refusal.cause_of(kernel) == cause
