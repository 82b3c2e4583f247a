"""From what a user types to vLLM's config: flag, keyword, and the pieces that Medusa needs."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_medusa import vllm_seams
from vllm_medusa.compatibility import check_config
from vllm_medusa.config import (
    MEDUSA_METHOD,
    MEDUSA_PREFIX,
    parse_speculative_model,
    with_plain_steps,
)
from vllm_medusa.ray_nodes import check_address
from vllm_medusa.speculative_config import MedusaSpeculativeConfig, create_medusa_config

logger = init_logger(f"vllm.{__name__}")

CUDA_WORKER = "vllm_medusa.worker.MedusaWorker"
CPU_WORKER = "vllm_medusa.cpu_worker.MedusaCPUWorker"
STOCK_WORKERS = ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
SYNC_SCHEDULER = "vllm_medusa.scheduler.MedusaScheduler"
ASYNC_SCHEDULER = "vllm_medusa.scheduler.MedusaAsyncScheduler"
CUDA_BACKENDS = {
    "triton": "vllm_medusa.attention_backend.TreeAttentionBackend",
    "xformers": "vllm_medusa.xformers_attention.XformersTreeBackend",
}
# vLLM's name for all parameters of the draft model.
DRAFT_PARAMETERS = "draft.*"
CPU_BACKEND = "vllm_medusa.cpu_attention_backend.TreeCPUAttentionBackend"


def add_cli_args(parser: Any) -> None:
    """Add ``--speculative-model`` to vLLM's engine arguments."""
    group = parser.add_argument_group(
        title="Medusa", description="Medusa tree speculation (plugin vllm-medusa)."
    )
    group.add_argument(
        "--speculative-model",
        type=str,
        default=None,
        metavar=f"{MEDUSA_PREFIX}PATH",
        help="Medusa heads: a directory, a .safetensors file or a hub id after "
        f"'{MEDUSA_PREFIX}'. Further options (tree, num_heads, num_speculative_tokens as node "
        "budget) go into --speculative-config.",
    )


def merge_speculative_model(speculative_config: dict | None, value: str) -> dict[str, Any]:
    """Fold ``speculative_model="medusa:PATH"`` into a ``speculative_config`` dictionary."""
    path = parse_speculative_model(value)
    merged = dict(speculative_config or {})
    for key, ours in (("method", MEDUSA_METHOD), ("model", path)):
        if merged.get(key, ours) != ours:
            raise ValueError(
                f"speculative_model={value!r} and speculative_config[{key!r}]={merged[key]!r} "
                "contradict each other; give one of them"
            )
        merged[key] = ours
    return merged


def is_medusa_request(engine_args: Any) -> bool:
    """Whether these engine arguments ask for Medusa."""
    if isinstance(engine_args.speculative_config, dict):
        method = engine_args.speculative_config.get("method", engine_args.spec_method)
    else:
        method = engine_args.spec_method
    return method == MEDUSA_METHOD


def create_config(
    engine_args: Any, target_model_config: Any, target_parallel_config: Any
) -> MedusaSpeculativeConfig | None:
    """Build the speculative config, honouring vLLM's ``--spec-*`` short forms."""
    given = dict(engine_args.speculative_config or {})
    for flag, key, value in (
        ("--spec-method", "method", engine_args.spec_method),
        ("--spec-model", "model", engine_args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", engine_args.spec_tokens),
    ):
        if value is None:
            continue
        if given.get(key, value) != value:
            raise ValueError(f"{flag} and speculative_config[{key!r}] are mutually exclusive")
        given[key] = value
    config = create_medusa_config(given, target_model_config, target_parallel_config)
    # vLLM's own default is above the schedule's last range, which has 0 nodes.
    if config is not None and config.node_frequencies and engine_args.max_num_seqs is not None:
        config.num_speculative_tokens_per_batch_size = with_plain_steps(
            config.num_speculative_tokens_per_batch_size, engine_args.max_num_seqs
        )
    return config


def prepare_other_engine() -> None:
    """Give an engine without Medusa vLLM's own CPU attention, whatever ran before it here."""
    if _cpu_backend_is_ours():
        AttentionBackendEnum.CPU_ATTN.clear_override()
        vllm_seams.forget_attention_choices()


def _cpu_backend_is_ours() -> bool:
    ours = AttentionBackendEnum.CPU_ATTN
    return ours.is_overridden() and ours.get_path() == CPU_BACKEND


def prepare_engine_args(engine_args: Any) -> None:
    """Choose the attention backend before vLLM builds its config.

    Raises
    ------
    ValueError
        When the user chose another attention backend or worker class.
    """
    chosen = engine_args.attention_backend or engine_args.attention_config.backend
    if engine_args.worker_cls != "auto":
        raise ValueError(
            f"worker_cls={engine_args.worker_cls!r} cannot be combined with Medusa, which brings "
            f"its own worker; subclass {CUDA_WORKER} or {CPU_WORKER} and run without the plugin's "
            "flag, or leave worker_cls unset"
        )
    if engine_args.scheduler_cls is not None:
        raise ValueError(
            f"scheduler_cls={engine_args.scheduler_cls!r} cannot be combined with Medusa, which "
            "brings its own scheduler; leave scheduler_cls unset"
        )
    if engine_args.enable_sleep_mode:
        # Sleep of level 2 drops all weights, and reload_weights brings back the target's only.
        kept = [*engine_args.sleep_preserve_parameter_names, DRAFT_PARAMETERS]
        engine_args.sleep_preserve_parameter_names = list(dict.fromkeys(kept))
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
        vllm_seams.forget_attention_choices()
        return
    ours = AttentionBackendEnum.CUSTOM
    if chosen not in (None, ours, ours.name):
        name = getattr(chosen, "name", chosen)
        raise ValueError(
            f"attention_backend={name!r} cannot verify token trees; leave it unset (prefill and "
            "plain decode still go to FlashAttention)"
        )
    given = engine_args.speculative_config
    attention = given.get("attention") if isinstance(given, dict) else None
    # An unknown name is refused with the config, which is made later.
    register_backend(ours, CUDA_BACKENDS.get(attention, CUDA_BACKENDS["triton"]))
    vllm_seams.forget_attention_choices()
    engine_args.attention_backend = ours


def finish_config(vllm_config: Any) -> None:
    """Name our worker and scheduler, and refuse what a tree cannot serve yet."""
    if vllm_config.speculative_config is None:  # no tree pays on this CPU
        prepare_other_engine()
        return
    worker = vllm_config.parallel_config.worker_cls
    if worker in STOCK_WORKERS:
        vllm_config.parallel_config.worker_cls = (
            CPU_WORKER if current_platform.is_cpu() else CUDA_WORKER
        )
    elif worker not in (CPU_WORKER, CUDA_WORKER):
        raise ValueError(
            f"medusa: this platform's worker {worker!r} is not one of {', '.join(STOCK_WORKERS)}; "
            "Medusa runs on vLLM's CUDA and CPU platforms"
        )
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SYNC_SCHEDULER
    check_config(vllm_config)
    if vllm_config.parallel_config.distributed_executor_backend == "ray":
        check_address(os.environ.get("RAY_ADDRESS"))
    if current_platform.is_cpu():
        _warn_of_slow_products(vllm_config.model_config.dtype)


def _warn_of_slow_products(dtype: torch.dtype) -> None:
    """Say it when several rows cost as much as several steps.

    Without AVX-512 oneDNN has no bfloat16 product and PyTorch's own costs each row
    anew: 13 rows took 12 times one row on Zen 3, in float32 1.9 times.
    """
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "Medusa: this CPU has no fast bfloat16 matrix product, so verifying a tree costs "
            "nearly a step per node; use --dtype float32"
        )
