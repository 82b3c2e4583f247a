"""Medusa tree speculation (arXiv 2401.10774) as a vLLM plugin.

Importing this package imports neither torch nor vLLM: Triton loads
``vllm_medusa.cpu_kernels.triton_stub`` through an entry point on every
``import triton``, which must stay cheap and free of cycles.
"""

__version__ = "0.1.0"
