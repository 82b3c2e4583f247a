"""Launches that are made again with other tensors, without Triton's own preparation.

Triton binds and specialises some forty arguments at every launch, which takes the host about
0.1 ms: ten times as long as the launch itself, and with a launch in each of 32 layers 3 ms of a
step that no CUDA graph covers.
"""

from __future__ import annotations

from typing import Any

import torch

# Triton compiles other code for pointers that are not multiples of this.
_ALIGNMENT = 16


class PreparedLaunch:
    """One launch, to be made again in a grid and with integers as they are.

    Parameters
    ----------
    kernel : triton.runtime.JITFunction
        Its arguments' names, in order.
    compiled : triton.compiler.CompiledKernel
        What the first launch returned.
    grid : tuple of int
    arguments : dict
        Name -> value of all of them, constants too.

    Examples
    --------
    >>> class Compiled(dict):
    ...     def __missing__(self, grid):
    ...         return lambda *args: print(grid, args)
    >>> class Kernel:
    ...     arg_names = ["out", "num_rows", "SIZE"]
    >>> again = PreparedLaunch(Kernel, Compiled(), (2, 1), {"SIZE": 4, "num_rows": 3, "out": "x"})
    >>> again(out="y")
    (2, 1, 1) ('y', 3, 4)
    """

    def __init__(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]
    ):
        self._places = {name: place for place, name in enumerate(kernel.arg_names)}
        self._values = [arguments[name] for name in kernel.arg_names]
        self._run = compiled[(*grid, *(1,) * (3 - len(grid)))]

    def __call__(self, **moved: Any) -> None:
        """Launch with other tensors of equal shapes, strides, types and alignment.

        Names that are no arguments of the kernel are passed over: launches that belong together
        are given the same tensors.
        """
        for name, value in moved.items():
            place = self._places.get(name)
            if place is not None:
                self._values[place] = value
        self._run(*self._values)


def launch_and_keep(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]
) -> PreparedLaunch | None:
    """Launch; what repeats it, or None from Triton's interpreter, which compiles nothing.

    Parameters
    ----------
    kernel : triton.runtime.JITFunction
    grid : tuple of int
    arguments, options : dict
        All of the kernel's arguments by name, and Triton's own.
    """
    compiled = kernel[grid](**arguments, **options)
    return None if compiled is None else PreparedLaunch(kernel, compiled, grid, arguments)


def are_aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels that were compiled for aligned pointers may be given these.

    Examples
    --------
    >>> whole = torch.zeros(8, dtype=torch.int32)
    >>> are_aligned(whole, None), are_aligned(whole[1:])
    (True, False)
    """
    pointers = 0
    for tensor in tensors:
        if tensor is not None:
            pointers |= tensor.data_ptr()
    return pointers % _ALIGNMENT == 0
