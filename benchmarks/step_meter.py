"""``worker_extension_cls`` that times decode steps and says what they must read and compute."""

from __future__ import annotations

from typing import Any

import torch

from vllm_medusa.step_timer import measure_steps


class StepMeter:
    """Mixed into a Medusa worker by vLLM."""

    def measure_model(self) -> dict[str, Any]:
        """Seconds of dummy decode steps, and the sizes that bound them.

        Returns
        -------
        dict
            ``steps``: ``[rows, requests, context, seconds]`` each; ``product_weights``: weights
            that multiply every row (an untied input embedding is looked up only) and
            ``weight_bytes``, theirs; ``draft_bytes``: what drafting reads, the heads and a shared
            lm_head once more; ``cache_bytes_per_token``; ``flops_per_row_and_key`` of attention.
        """
        runner = self.model_runner
        with torch.inference_mode():
            costs = measure_steps(runner)
        parameters = dict(runner.model.named_parameters())
        has_lm_head = any("lm_head" in name for name in parameters)
        used = [p for name, p in parameters.items() if not (has_lm_head and "embed_tok" in name)]
        last = "lm_head" if has_lm_head else "embed_tok"
        lm_head = sum(p.nbytes for name, p in parameters.items() if last in name)
        shares = runner.speculator.model.lm_head is None
        config, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        layers, size = config.get_num_layers(parallel), config.get_head_size()
        kv_width = runner.kv_caches[0].element_size()
        return {
            "steps": [[*key, seconds] for key, seconds in costs.seconds.items()],
            "product_weights": sum(p.numel() for p in used),
            "weight_bytes": sum(p.nbytes for p in used),
            "draft_bytes": runner.head_bytes() + (lm_head if shares else 0),
            "cache_bytes_per_token": 2
            * layers
            * config.get_num_kv_heads(parallel)
            * size
            * kv_width,
            # Scores and weighted values, two operations each.
            "flops_per_row_and_key": 4 * layers * config.get_num_attention_heads(parallel) * size,
        }
