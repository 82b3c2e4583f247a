"""Triton kernels of vllm-medusa, installed as ``vllm_medusa.triton_kernels``.

vLLM looks for a top-level module called ``triton_kernels`` (OpenAI's MoE
kernels) and takes whatever it finds.  Under the bare name, which is importable
from a checkout's root, this package therefore refuses to load; vLLM reads the
ImportError as "not installed" and goes on with its own copy.
"""

if __name__ == "triton_kernels":
    raise ImportError("vllm-medusa's kernels are importable as vllm_medusa.triton_kernels only")
