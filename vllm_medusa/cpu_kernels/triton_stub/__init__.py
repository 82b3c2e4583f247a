"""An inert Triton backend named ``cpu``.

vLLM's V2 model runner starts on a CPU only when Triton lists a backend of that
name (``vllm/triton_utils/importing.py``). This one satisfies the check and is
never active: nothing is compiled through it, and the kernels of the step have
PyTorch fall-backs (``vllm_medusa.cpu_kernels``). Triton imports it on every
``import triton``, on GPU hosts too, so it imports neither torch nor vLLM.
"""

import importlib
import inspect
from pathlib import Path

# Not `triton.backends`: the package `triton` is still half imported at this point.
from triton import backends


def real_backend_class(module_name: str, base: type) -> type | None:
    """Return the class of a real CPU backend built into Triton, if there is one.

    A Triton built with CPU support registers an entry point of the same name as
    ours and the last one listed wins; answering with its classes makes the order
    immaterial.

    Parameters
    ----------
    module_name : str
        ``"driver"`` or ``"compiler"``.
    base : type
        ``DriverBase`` or ``BaseBackend``.

    Returns
    -------
    type or None
        The concrete subclass found in ``triton.backends.cpu.<module_name>``.
    """
    if not any(Path(path, "cpu").is_dir() for path in backends.__path__):
        return None
    module = importlib.import_module(f"triton.backends.cpu.{module_name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, base) and not inspect.isabstract(value):
            return value
    return None
