"""A float32 matrix product for a few rows on a CPU, compiled where a C++ compiler is found.

One row reads every weight once and waits for memory. oneDNN lets further rows cost extra:
on two Zen 3 cores 1 / 6 / 12 rows of all products of SmolLM2-135M take 25 / 34 / 43 ms. Six
rows fit the registers while the weights stream by: here they take 20 / 20 / 28 ms, and
9 / 10 / 19 ms where every weight is a bfloat16, as in most checkpoints, and is kept as one.
Each row's sum runs in the same order whatever the number of rows, so a row's result does not
depend on its neighbours, nor on how the weights are kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
BUILD_TIMEOUT_S = 60

# Output columns that the kernel computes together.
PANEL = 16


class RowKernels:
    """The compiled functions of ``cpu_rows.cpp``.

    Parameters
    ----------
    library : pathlib.Path
    """

    def __init__(self, library: Path):
        functions = ctypes.CDLL(str(library))
        address, number = ctypes.c_void_p, ctypes.c_long
        # panels' dtype -> product
        self.products = {
            torch.float32: functions.rows_product,
            torch.int32: functions.rows_product_halves,
        }
        for product in self.products.values():
            product.argtypes = [address, number, address, number, address, number]
            product.restype = None
        self.tree_attention = functions.tree_rows_attention
        self.tree_attention.argtypes = [
            *(address, address, number, address, number),
            *(ctypes.c_float, address),
        ]
        self.tree_attention.restype = None


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use too, or None."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


def load(folder: Path) -> RowKernels:
    """The kernels, compiled into ``folder`` or found there.

    Raises
    ------
    OSError
        Without a compiler, or where it fails; says why.
    """
    program = compiler()
    if program is None:
        raise OSError("no C++ compiler (CXX, g++, clang++ or c++)")
    # Another processor or compiler makes another file: -march=native is not portable.
    identity = "\n".join([SOURCE.read_text(), program, *FLAGS, processor()])
    library = folder / f"rows-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _compile(program, library)
    return RowKernels(library)


def _compile(program: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Ranks may compile at once: each renames a whole file into place.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        draft = Path(scratch) / library.name
        command = [program, *FLAGS, str(SOURCE), "-o", str(draft)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
            )
        except subprocess.CalledProcessError as error:
            raise OSError(f"{program} failed: {error.stderr.strip()[-200:]}") from None
        except subprocess.TimeoutExpired:
            raise OSError(f"{program} took longer than {BUILD_TIMEOUT_S} s") from None
        draft.replace(library)


def processor() -> str:
    """Model and features of this processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight [out_features, in_features] divides into panels."""
    return weight.ndim == 2 and weight.dtype == torch.float32 and weight.shape[0] % PANEL == 0


def pack(
    weight: torch.Tensor,  # [out_features, in_features] float32
) -> torch.Tensor:
    """Panels of a weight, read front to back.

    Returns
    -------
    torch.Tensor
        [out_features / PANEL, in_features, PANEL] float32, or, if every weight is a bfloat16,
        [out_features / PANEL, in_features, PANEL / 2] int32: column j in the lower half of a
        word, column j + PANEL / 2 in the upper half.
    """
    panels = weight.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()
    words = panels.view(torch.int32)
    if (words & 0xFFFF).any():
        return panels
    lower, upper = words.split(PANEL // 2, dim=-1)
    return (lower >> 16 & 0xFFFF) | upper


def product(
    kernels: RowKernels,
    x: torch.Tensor,  # [..., in_features] float32
    panels: torch.Tensor,  # as `pack` returns them
) -> torch.Tensor:
    """``x @ weight.T``, [..., out_features]."""
    num_panels, depth, _ = panels.shape
    *rows, _ = x.shape
    width = num_panels * PANEL
    out = x.new_empty(*rows, width)
    x = x.contiguous()
    kernels.products[panels.dtype](
        x.data_ptr(), x.numel() // depth, panels.data_ptr(), depth, out.data_ptr(), width
    )
    return out
