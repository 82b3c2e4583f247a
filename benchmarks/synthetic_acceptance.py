"""``worker_extension_cls`` for benchmarks: what is accepted is drawn, as the tree promises it.

Loading this module changes the verification of every engine of this process.  Nothing but a
benchmark that says so in its record may ask for it: the output is no text of the model.
"""

from __future__ import annotations

from synthetic_draws import SyntheticStep, SyntheticVerifier
from vllm.logger import init_logger

from vllm_medusa.runner import TreeRunnerMixin

# The worker, and this module with it, is there before its runner builds what verifies.
TreeRunnerMixin.verifier_class = SyntheticVerifier
TreeRunnerMixin.step_class = SyntheticStep
init_logger(f"vllm.{__name__}").warning(
    "Medusa: SYNTHETIC acceptance, for benchmarks only: drafts are accepted by chance, the output "
    "is no text of the model"
)


class SyntheticAcceptance:
    """Mixed into the worker by vLLM."""

    def synthetic_promise(self) -> float:
        """Tokens per step that the whole tree yields."""
        return self.model_runner.verification_step.draws.promise
