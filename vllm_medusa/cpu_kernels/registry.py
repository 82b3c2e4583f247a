"""Which fall-back stands in for which kernel, and when."""

from collections.abc import Callable

from vllm_medusa.cpu_kernels import block_tables, gumbel, staged_writes, step_inputs, step_results
from vllm_medusa.cpu_kernels.temperature import temperature_kernel

_RUNNER = "vllm.v1.worker.gpu"

# Qualified kernel name -> fall-back of the same arguments.
FALLBACKS: dict[str, Callable[..., None]] = {
    f"{_RUNNER}.buffer_utils._apply_write_kernel": staged_writes.apply_write_kernel,
    f"{_RUNNER}.block_table._gather_block_tables_kernel": block_tables.gather_block_tables_kernel,
    f"{_RUNNER}.block_table._compute_slot_mappings_kernel": (
        block_tables.compute_slot_mappings_kernel
    ),
    f"{_RUNNER}.input_batch._prepare_prefill_inputs_kernel": (
        step_inputs.prepare_prefill_inputs_kernel
    ),
    f"{_RUNNER}.input_batch._prepare_pos_seq_lens_kernel": step_inputs.prepare_pos_seq_lens_kernel,
    f"{_RUNNER}.input_batch._combine_sampled_and_draft_tokens_kernel": (
        step_inputs.combine_sampled_and_draft_tokens_kernel
    ),
    f"{_RUNNER}.input_batch._expand_idx_mapping_kernel": step_inputs.expand_idx_mapping_kernel,
    f"{_RUNNER}.input_batch._get_num_sampled_and_rejected_kernel": (
        step_results.get_num_sampled_and_rejected_kernel
    ),
    f"{_RUNNER}.input_batch._post_update_kernel": step_results.post_update_kernel,
    f"{_RUNNER}.input_batch._post_update_num_computed_tokens_kernel": (
        step_results.post_update_num_computed_tokens_kernel
    ),
    f"{_RUNNER}.sample.gumbel._gumbel_sample_kernel": gumbel.gumbel_sample_kernel,
    f"{_RUNNER}.sample.gumbel._temperature_kernel": temperature_kernel,
}

_registered = False


def fallbacks_wanted() -> bool:
    """Tell whether kernels have nothing better to run on than the fall-backs.

    Returns
    -------
    bool
        True on a CPU whose Triton knows no CPU backend but the inert one of this
        package, unless kernels are interpreted (``TRITON_INTERPRET=1``).
    """
    import triton
    from triton.backends import backends
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or triton.knobs.runtime.interpret:
        return False
    backend = backends.get("cpu")
    return backend is None or backend.driver.__module__.startswith(f"{__package__}.")


def register_fallbacks() -> bool:
    """Register every fall-back with vLLM's kernel dispatcher; see ``cpu_kernels.register``."""
    global _registered
    if not fallbacks_wanted():
        return False
    if not _registered:
        from vllm.triton_utils.dispatcher import register_kernels

        register_kernels(FALLBACKS)
        _registered = True
    return True
