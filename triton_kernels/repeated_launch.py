"""A launch that is made again with other tensors: what the host works out once for all layers."""

from __future__ import annotations

from typing import Any


class RepeatedLaunch:
    """A launch whose grid and integers stay as they are.

    Triton still binds the arguments anew, so that tensors may come in any alignment.

    Parameters
    ----------
    kernel : triton.runtime.JITFunction
    grid : tuple of int
    arguments : dict
        Name -> value of all of the kernel's arguments, constants too.
    options : dict
        Triton's own, e.g. ``num_warps``.

    Examples
    --------
    >>> class Kernel(dict):
    ...     arg_names = ["out", "num_rows", "SIZE"]
    ...     def __missing__(self, grid):
    ...         return lambda *args, **options: print(grid, args, options)
    >>> arguments = {"SIZE": 4, "num_rows": 3, "out": "x"}
    >>> again = RepeatedLaunch(Kernel(), (2, 1), arguments, {"num_warps": 4})
    >>> again(out="y")
    (2, 1) ('y', 3, 4) {'num_warps': 4}
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]
    ):
        self._places = {name: place for place, name in enumerate(kernel.arg_names)}
        self._values = [arguments[name] for name in kernel.arg_names]
        self._launch = kernel[grid]
        self._options = options

    def __call__(self, **moved: Any) -> Any:
        """Launch with other tensors of equal shapes, strides and types; the compiled kernel.

        Names that are no arguments of the kernel are passed over: launches that belong together
        are given the same tensors.
        """
        for name, value in moved.items():
            place = self._places.get(name)
            if place is not None:
                self._values[place] = value
        return self._launch(*self._values, **self._options)
