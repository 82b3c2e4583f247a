"""Driver half of the inert ``cpu`` backend. Triton wants exactly one driver class here."""

from typing import NoReturn

from triton.backends.driver import DriverBase

from vllm_medusa.cpu_kernels.triton_stub import real_backend_class

CPUDriver = real_backend_class("driver", DriverBase)

if CPUDriver is None:

    class CPUDriver(DriverBase):  # type: ignore[no-redef]
        """Never active: Triton must not choose it, and Inductor must not compile for it."""

        @classmethod
        def is_active(cls) -> bool:
            """Report False so that a GPU driver stays the only candidate."""
            return False

        def map_python_to_cpp_type(self, ty: str) -> str:
            """Refuse: there is nothing to compile to."""
            self._refuse()

        def get_current_target(self) -> NoReturn:
            """Refuse: there is no target."""
            self._refuse()

        def get_active_torch_device(self) -> NoReturn:
            """Refuse: there is no device."""
            self._refuse()

        def get_benchmarker(self) -> NoReturn:
            """Refuse: there is nothing to time."""
            self._refuse()

        @staticmethod
        def _refuse() -> NoReturn:
            raise RuntimeError(
                "Triton kernels cannot be compiled for this CPU: the `cpu` backend installed by "
                "vllm-medusa only lets vLLM's V2 model runner start. Set TRITON_INTERPRET=1 to "
                "interpret the kernel, or install a Triton built with CPU support."
            )
