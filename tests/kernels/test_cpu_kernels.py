"""Every CPU fall-back against vLLM's own kernel under Triton's interpreter.

Both run the same cases (``cpu_cases``) in processes of their own, because Triton
decides at import whether it interprets.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_medusa.cpu_kernels import registry

pytestmark = pytest.mark.vllm

HERE = Path(__file__).parent
TIMEOUT_S = 600
# Launched by no case: compared with definitions in test_cpu_kernels_definitions.py.
# The interpreter lacks `isnan`, and fails in the top-k/top-p kernel.
DEFINED_ELSEWHERE = {
    "vllm.v1.worker.gpu.metrics.logits._num_nans_kernel",
    "vllm.v1.sample.ops.topk_topp_triton.apply_top_k_top_p_triton",
}
# Sums of exponentials in another order: a few units in the last place of float32
# log-probabilities, which are below 16 in size here.
LOGPROB_ATOL = 1e-5
# The interpreter cuts float32 to bfloat16 where hardware and PyTorch round: one unit
# in the last of bfloat16's 8 significant bits.
BFLOAT16_RTOL = 2**-7
INEXACT = {
    "logprobs": {"rtol": 0.0, "atol": LOGPROB_ATOL},
    "temperature: bfloat16": {"rtol": BFLOAT16_RTOL, "atol": 0.0},
    "penalties: bfloat16": {"rtol": BFLOAT16_RTOL, "atol": BFLOAT16_RTOL},
}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Outputs of all cases by "triton" and "fallback", computed side by side."""
    folder = tmp_path_factory.mktemp("cpu_kernels")
    processes = {}
    for half, interpret in (("triton", "1"), ("fallback", "0")):
        environment = {
            **os.environ,
            "TRITON_INTERPRET": interpret,
            "VLLM_PLUGINS": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        processes[half] = subprocess.Popen(
            [sys.executable, "-m", "cpu_cases.run", str(folder / half)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    results = {}
    for half, process in processes.items():
        output, _ = process.communicate(timeout=TIMEOUT_S)
        if process.returncode != 0:
            pytest.fail(f"the {half} half failed:\n{output[-6000:]}")
        results[half] = torch.load(folder / half, weights_only=True)
    return results


def tolerance(case: str) -> dict[str, float] | None:
    """Tolerances of a case's float outputs; None: exactly equal."""
    return INEXACT.get(case, INEXACT.get(case.partition(":")[0]))


def test_outputs_match_the_kernels(halves: dict[str, dict]) -> None:
    expected, actual = halves["triton"]["outputs"], halves["fallback"]["outputs"]
    assert list(actual) == list(expected)
    different = []
    for case, tensors in expected.items():
        assert list(actual[case]) == list(tensors)
        for name, tensor in tensors.items():
            limits = tolerance(case) if tensor.is_floating_point() else None
            try:
                torch.testing.assert_close(
                    actual[case][name], tensor, **(limits or {"rtol": 0.0, "atol": 0.0})
                )
            except AssertionError as error:
                different.append(f"{case} / {name}: {error}")
    assert not different, "\n\n".join(different)


def test_every_fallback_ran(halves: dict[str, dict]) -> None:
    assert halves["triton"]["called"] == []
    assert set(halves["fallback"]["called"]) == set(registry.FALLBACKS) - DEFINED_ELSEWHERE


def test_sampling_cases_are_not_trivial(halves: dict[str, dict]) -> None:
    """Noise changes the choice, and drafts are both accepted and rejected."""
    outputs = halves["triton"]["outputs"]
    assert len(set(outputs["gumbel: flat logits"]["sampled"].tolist())) > 5
    for case in ("rejection: greedy", "rejection: sampled"):
        num_sampled = outputs[case]["num_sampled"]
        assert num_sampled.min() < num_sampled.max()
