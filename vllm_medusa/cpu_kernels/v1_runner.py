"""vLLM's own fall-backs for its V1 runner, which the inert backend would switch off.

``CpuPlatform.register_triton_kernel_overrides`` registers them only when Triton has
no ``cpu`` backend at all. With ours listed it returns early, although nothing can
run on it, so the V1 runner would be left without.
"""

from collections.abc import Callable

# Kernel name -> function of vllm.utils.cpu_triton_utils, as in vLLM 0.32's platforms/cpu.py.
_OVERRIDES = {
    "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": (
        "_compute_slot_mapping_kernel_impl"
    ),
    "vllm.v1.spec_decode.utils.eagle_step_slot_mapping_metadata_kernel": (
        "_eagle_step_slot_mapping_metadata_kernel_impl"
    ),
    "vllm.v1.spec_decode.utils.eagle_prepare_inputs_padded_kernel": (
        "_eagle_prepare_inputs_padded_kernel_impl"
    ),
    "vllm.v1.spec_decode.utils.eagle_prepare_next_token_padded_kernel": (
        "_eagle_prepare_next_token_padded_kernel_impl"
    ),
    "vllm.v1.spec_decode.utils.copy_and_expand_eagle_inputs_kernel": (
        "_copy_and_expand_eagle_inputs_kernel_impl"
    ),
    "vllm.v1.spec_decode.utils.copy_and_expand_dflash_inputs_kernel": (
        "_copy_and_expand_dflash_inputs_kernel_impl"
    ),
    "vllm.v1.sample.rejection_sampler.rejection_greedy_sample_kernel": (
        "_rejection_greedy_sample_kernel_impl"
    ),
    "vllm.v1.sample.rejection_sampler.rejection_random_sample_kernel": (
        "_rejection_random_sample_kernel_impl"
    ),
    "vllm.v1.sample.rejection_sampler.expand_kernel": "_expand_kernel_impl",
    "vllm.v1.sample.rejection_sampler.sample_recovered_tokens_kernel": (
        "_sample_recovered_tokens_kernel_impl"
    ),
    "vllm.v1.worker.mamba_utils.batch_memcpy_kernel": "_batch_memcpy_impl",
}


def v1_fallbacks() -> dict[str, Callable[..., None]]:
    """Collect vLLM's fall-backs for the V1 runner.

    Returns
    -------
    dict
        Qualified kernel name -> function, as ``register_kernels`` takes it.
    """
    from vllm.utils import cpu_triton_utils

    return {kernel: getattr(cpu_triton_utils, name) for kernel, name in _OVERRIDES.items()}
