"""What this machine is and has: Python, GPU, compiler, cores, disk."""

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

try:
    from .failure import StepError
except ImportError:  # run as a script: the folder itself is on sys.path
    from failure import StepError

DEVICE_VARIABLE = "VLLM_MEDUSA_DEVICE"
DEVICES = ("cpu", "cuda")

GIB = 1 << 30
# Measured size of the finished environment plus the model and pip's temporary
# copies of the largest wheels, rounded up.
DISK_NEEDED = {"cpu": 6 * GIB, "cuda": 24 * GIB}


def check_platform() -> None:
    """Refuse machines for which vLLM has no wheel."""
    if sys.platform != "linux":
        raise StepError(
            f"vLLM has wheels for Linux only and this is {platform.system()}: "
            "run this in a Linux machine, container or WSL 2."
        )
    if platform.machine() not in ("x86_64", "aarch64"):
        raise StepError(
            f"vLLM has wheels for x86_64 and aarch64 and this is {platform.machine()}: "
            "run this on one of those."
        )


def check_venv_module() -> None:
    """Refuse a Python that cannot make virtual environments with pip inside."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise StepError(
            f"Python at {sys.executable} has no module {' and '.join(missing)}: install it "
            f"(Debian, Ubuntu: apt-get install python{python_tag()}-venv) and run this again."
        )


def python_tag() -> str:
    """Return the running Python's ``major.minor``."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def detect_device() -> str:
    """Return ``"cuda"`` where an NVIDIA GPU answers, else ``"cpu"``.

    The environment variable VLLM_MEDUSA_DEVICE overrides the detection.
    """
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    if wanted:
        if wanted not in DEVICES:
            raise StepError(
                f"{DEVICE_VARIABLE} is {wanted!r}: set it to one of {', '.join(DEVICES)} "
                "or leave it out."
            )
        return wanted
    return "cuda" if nvidia_gpus() else "cpu"


def nvidia_gpus() -> list[str]:
    """Return the lines of ``nvidia-smi -L``, one per GPU; empty without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        answer = subprocess.run(
            [command, "-L"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in answer.stdout.splitlines() if line.startswith("GPU ")]


def usable_cores() -> list[int]:
    """Return the sorted ids of the CPU cores this process may run on."""
    return sorted(os.sched_getaffinity(0))


def python_header() -> Path:
    """Return where this Python's C header would be."""
    return Path(sysconfig.get_path("include")) / "Python.h"


def can_compile_extensions() -> bool:
    """Tell whether torch.compile's C++ code would find a compiler and Python.h."""
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return has_compiler and python_header().exists()


def check_system_packages(device: str) -> None:
    """Refuse a machine without what vLLM's wheels expect of the operating system."""
    if device == "cpu":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            raise StepError(
                "vLLM for CPUs needs the library libnuma.so.1, which is not on this machine: "
                "install it (Debian, Ubuntu: apt-get install libnuma1) and run this again."
            ) from None
    elif not (shutil.which("gcc") and python_header().exists()):
        # Triton compiles a small launcher in C for every kernel it loads.
        raise StepError(
            f"Triton needs gcc and {python_header()} to load GPU kernels: install them (Debian, "
            f"Ubuntu: apt-get install gcc python{python_tag()}-dev) and run this again."
        )


def check_disk(folder: Path, device: str) -> None:
    """Refuse to fill a disk: compare free space under ``folder`` with what is needed."""
    needed = DISK_NEEDED[device]
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StepError(
            f"The disk of {folder} has {free / GIB:.1f} GiB free and the environment needs about "
            f"{needed / GIB:.0f} GiB: free some, or point VLLM_MEDUSA_VENV and VLLM_MEDUSA_CACHE "
            "at folders on a larger disk."
        )
