"""Run one engine configuration over several batches in a process of its own.

    python engine_job.py JOB.json RESULT.json

JOB: {"engine": {LLM arguments}, "plain_v2": bool, "batches": [{"prompts": [[ids]],
"sampling": [{...}]}], "break": null | "compaction"}.  The result holds token ids,
logprobs, spec-decode counters and the classes that really ran.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def use_plain_v2(engine: dict) -> None:
    """Stock V2 runner without speculation: what seeded output is compared with on a CPU."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import vllm.config.vllm as config_module

    config_module.HAS_TRITON = True
    engine["worker_cls"] = "plain_v2_worker.PlainV2CPUWorker"


def record_launches() -> dict[str, list]:
    """From now on note the dtypes of every kernel launch: kernel -> argument -> dtypes."""
    import torch
    from vllm.triton_utils.dispatcher import KernelOverride

    seen: dict[str, dict[str, set]] = {}
    launch = KernelOverride._launch

    def noting(self, *args, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        for name, value in named.items():
            if isinstance(value, torch.Tensor):
                place = seen.setdefault(self.__name__, {}).setdefault(name, set())
                place.add(str(value.dtype))
        return launch(self, *args, **kwargs)

    KernelOverride._launch = noting
    return seen


def sampling_params(cls, fields: dict):
    """JSON turned a logit bias's token ids into strings."""
    if "logit_bias" in fields:
        bias = {int(token): value for token, value in fields["logit_bias"].items()}
        fields = fields | {"logit_bias": bias}
    return cls(detokenize=False, **fields)


def logprob_rows(rows: list | None) -> list | None:
    """[[token, logprob, rank], ...] per position, sorted; None where there are none."""
    if rows is None:
        return None
    return [
        None if row is None else sorted([token, lp.logprob, lp.rank] for token, lp in row.items())
        for row in rows
    ]


def counters(llm) -> dict:
    """Spec-decode counters of the engine's Prometheus registry."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            found[metric.name] = getattr(metric, "values", None) or metric.value
        if metric.name == "vllm:num_preemptions":
            found[metric.name] = metric.value
        if metric.name == "vllm:prefix_cache_hits":
            found[metric.name] = metric.value
    return found


def generate(llm: Any, batch: dict) -> list[dict]:
    """One batch's outputs.

    Besides "prompts" and "sampling", a batch may name a "lora" adapter's directory (every
    second request uses it), an "embeddings" tensor file (prompts become embeddings), or
    requests to "abort" [indices] once their output has "abort_after" tokens.
    """
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
    if "embeddings" in batch:
        import torch

        table = torch.load(batch["embeddings"], weights_only=True)
        prompts = [{"prompt_embeds": table[ids]} for ids in batch["prompts"]]
    params = [sampling_params(SamplingParams, p) for p in batch["sampling"]]
    adapters = [None] * len(prompts)
    if "lora" in batch:
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, batch["lora"])
        adapters = [adapter if index % 2 else None for index in range(len(prompts))]
    if "abort" in batch:
        outputs = generate_and_abort(llm, prompts, params, batch["abort"], batch["abort_after"])
    else:
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
    return [
        {
            "token_ids": [list(c.token_ids) for c in output.outputs],
            "logprobs": logprob_rows(output.outputs[0].logprobs),
            "prompt_logprobs": logprob_rows(output.prompt_logprobs),
            "finish": output.outputs[0].finish_reason,
        }
        for output in outputs
    ]


def generate_and_abort(
    llm: Any, prompts: list, params: list, indices: list[int], after: int
) -> list:
    """Drive the engine step by step; aborted requests return what they had last shown."""
    engine = llm.llm_engine
    for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(index), prompt, param)
    latest: dict[str, Any] = {}
    waiting = {str(index) for index in indices}
    while engine.has_unfinished_requests():
        for output in engine.step():
            latest[output.request_id] = output
            if output.request_id in waiting and len(output.outputs[0].token_ids) >= after:
                waiting.remove(output.request_id)
                engine.abort_request([output.request_id])
    return [latest[str(index)] for index in range(len(prompts))]


def run(job: dict) -> tuple[dict, Any]:
    """One engine over its batches: the result, and the engine for the caller to stop."""
    engine = job["engine"]
    if job.get("plain_v2"):
        use_plain_v2(engine)
    from vllm import LLM

    if job.get("break") == "compaction":
        # Shadows the method until the process ends: such a job is the last of its process.
        from vllm_medusa.compaction import PathCompactor

        PathCompactor.compact = lambda *args, **kwargs: None
    launches = record_launches() if job.get("record_launches") else {}
    llm = LLM(skip_tokenizer_init=True, disable_log_stats=False, **engine)
    results = [generate(llm, batch) for batch in job["batches"]]
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    worker = executor.driver_worker.worker
    runner = worker.model_runner
    result = {
        "batches": results,
        "counters": counters(llm),
        "launches": {
            kernel: {name: sorted(dtypes) for name, dtypes in arguments.items()}
            for kernel, arguments in launches.items()
        },
        "worker": f"{type(worker).__module__}.{type(worker).__name__}",
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "scheduler": type(llm.llm_engine.engine_core.engine_core.scheduler).__name__,
        "speculative": repr(llm.llm_engine.vllm_config.speculative_config),
    }
    return result, llm


def main() -> None:
    """Run the job."""
    result, _ = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
