"""Which fall-back stands in for which kernel."""

from collections.abc import Callable
from typing import Any

from vllm_medusa.cpu_kernels import (
    block_tables,
    draft_rows,
    logprobs,
    ngram,
    penalties,
    rejection,
    resampling,
    staged_writes,
    step_inputs,
    step_results,
    thinking_budget,
)
from vllm_medusa.cpu_kernels.bad_words import bad_words_kernel
from vllm_medusa.cpu_kernels.grammar_bitmask import apply_grammar_bitmask_kernel
from vllm_medusa.cpu_kernels.gumbel import gumbel_sample_kernel
from vllm_medusa.cpu_kernels.kv_blocks import zero_kv_blocks_kernel
from vllm_medusa.cpu_kernels.logit_bias import bias_kernel
from vllm_medusa.cpu_kernels.min_p import min_p_kernel
from vllm_medusa.cpu_kernels.num_nans import num_nans_kernel
from vllm_medusa.cpu_kernels.prompt_embeds import apply_prompt_embeds_kernel
from vllm_medusa.cpu_kernels.rope_positions import prepare_rope_positions_kernel
from vllm_medusa.cpu_kernels.sampling_mask import compact_sampling_mask_kernel
from vllm_medusa.cpu_kernels.temperature import temperature_kernel
from vllm_medusa.cpu_kernels.topk_topp import apply_top_k_top_p_triton
from vllm_medusa.cpu_kernels.trace_replay import trace_replay_kernel

_RUNNER = "vllm.v1.worker.gpu"

# vLLM module -> its fall-backs. A fall-back has the kernel's name without the leading
# underscore and the kernel's arguments.
_MODULES: dict[str, tuple[Callable[..., Any], ...]] = {
    f"{_RUNNER}.buffer_utils": (staged_writes.apply_write_kernel,),
    f"{_RUNNER}.block_table": (
        block_tables.gather_block_tables_kernel,
        block_tables.compute_slot_mappings_kernel,
    ),
    f"{_RUNNER}.input_batch": (
        step_inputs.prepare_prefill_inputs_kernel,
        step_inputs.prepare_pos_seq_lens_kernel,
        step_inputs.combine_sampled_and_draft_tokens_kernel,
        step_inputs.expand_idx_mapping_kernel,
        step_results.get_num_sampled_and_rejected_kernel,
        step_results.post_update_kernel,
        step_results.post_update_num_computed_tokens_kernel,
    ),
    f"{_RUNNER}.mm.rope": (prepare_rope_positions_kernel,),
    f"{_RUNNER}.model_states.prompt_embeds": (apply_prompt_embeds_kernel,),
    f"{_RUNNER}.metrics.logits": (num_nans_kernel,),
    f"{_RUNNER}.structured_outputs": (apply_grammar_bitmask_kernel,),
    f"{_RUNNER}.sample.gumbel": (gumbel_sample_kernel, temperature_kernel),
    f"{_RUNNER}.sample.min_p": (min_p_kernel,),
    f"{_RUNNER}.sample.penalties": (penalties.penalties_kernel, penalties.bincount_kernel),
    f"{_RUNNER}.sample.bad_words": (bad_words_kernel,),
    f"{_RUNNER}.sample.logit_bias": (bias_kernel,),
    f"{_RUNNER}.sample.logprob": (
        logprobs.topk_log_softmax_kernel,
        logprobs.ranks_kernel,
        logprobs.fill_logprob_token_ids_kernel,
    ),
    f"{_RUNNER}.sample.prompt_logprob": (logprobs.prompt_logprobs_token_ids_kernel,),
    f"{_RUNNER}.sample.output": (compact_sampling_mask_kernel,),
    f"{_RUNNER}.sample.thinking_budget": (
        thinking_budget.update_committed_marker_cache_kernel,
        thinking_budget.thinking_budget_kernel,
    ),
    f"{_RUNNER}.sample.trace_replay": (trace_replay_kernel,),
    f"{_RUNNER}.spec_decode.ngram.speculator": (
        ngram.ngram_scan_kernel,
        ngram.ngram_finalize_kernel,
    ),
    f"{_RUNNER}.spec_decode.rejection_sampler": (
        draft_rows.gather_draft_sampled_kernel,
        draft_rows.flatten_sampled_kernel,
    ),
    f"{_RUNNER}.spec_decode.rejection_sampler_utils": (
        rejection.compute_local_logits_stats_kernel,
        rejection.rejection_kernel,
        resampling.resample_kernel,
        resampling.insert_resampled_kernel,
    ),
    "vllm.v1.worker.utils": (zero_kv_blocks_kernel,),
}

# Qualified name -> fall-back. Top-k/top-p is replaced at its launcher, which is no
# kernel but looks up like one: it has four kernels and one meaning.
FALLBACKS: dict[str, Callable[..., Any]] = {
    f"{module}._{fallback.__name__}": fallback
    for module, fallbacks in _MODULES.items()
    for fallback in fallbacks
} | {"vllm.v1.sample.ops.topk_topp_triton.apply_top_k_top_p_triton": apply_top_k_top_p_triton}
