"""Compiler half of the inert ``cpu`` backend. Triton wants exactly one backend class here."""

from typing import NoReturn

from triton.backends.compiler import BaseBackend, GPUTarget

from vllm_medusa.cpu_kernels.triton_stub import real_backend_class

CPUBackend = real_backend_class("compiler", BaseBackend)

if CPUBackend is None:

    class CPUBackend(BaseBackend):  # type: ignore[no-redef]
        """Supports no target, so Triton never asks it to compile."""

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            """Report False for every target."""
            return False

        def hash(self) -> str:
            """Name this backend in Triton's cache keys."""
            return "vllm-medusa-cpu-stub"

        def parse_options(self, options: dict) -> NoReturn:
            """Refuse: there is nothing to compile."""
            self._refuse()

        def add_stages(self, stages: dict, options: object, language: object = None) -> NoReturn:
            """Refuse: there is nothing to compile."""
            self._refuse()

        def load_dialects(self, context: object) -> NoReturn:
            """Refuse: there is nothing to compile."""
            self._refuse()

        def get_module_map(self) -> dict:
            """Map no interface module to a device implementation."""
            return {}

        @staticmethod
        def _refuse() -> NoReturn:
            raise RuntimeError(
                "The `cpu` Triton backend installed by vllm-medusa only lets vLLM's V2 model "
                "runner start; it compiles nothing."
            )
