"""Triton kernels of vllm-medusa, installed as ``vllm_medusa.triton_kernels``.

vLLM looks for a top-level module called ``triton_kernels`` (OpenAI's MoE
kernels) and takes whatever it finds.  Under the bare name, which is importable
from a checkout's root, this package therefore refuses to load; vLLM reads the
ImportError as "not installed" and goes on with its own copy.

The launchers are loaded on first use, so that ``reference`` (the plain PyTorch
twins) can be imported where Triton is not installed.
"""

if __name__ == "triton_kernels":
    raise ImportError("vllm-medusa's kernels are importable as vllm_medusa.triton_kernels only")

from importlib import import_module
from typing import Any

# public name -> module that defines it; no module carries the name of a launcher,
# because importing a submodule would overwrite the attribute of the same name.
_LAUNCHERS = {
    "add_tree_attention": "attention",
    "add_update": "sequential",
    "best_tree": "tree_choice",
    "KVCompactor": "kv_compaction",
    "compact_kv": "kv_compaction",
    "draft_tree": "draft",
    "embed_paths": "sequential",
    "float8_product": "float8",
    "lookup_chain": "lookup",
    "scatter_tree": "scatter",
    "top_tokens": "draft_tokens",
    "tree_attention": "attention",
    "tree_walk": "walk",
}

__all__ = sorted(_LAUNCHERS)


def __getattr__(name: str) -> Any:
    if name not in _LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAUNCHERS[name]}"), name)
    globals()[name] = value
    return value
