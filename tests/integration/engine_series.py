"""Run several engines after one another in one process, which saves their imports.

    python engine_series.py JOBS.json RESULTS.json

JOBS: {name: job}, in order.  A job is {"engine": {LLM arguments}, "plain_v2": bool,
"batches": [batch], "tokenizer": bool, "async": bool, "break": null | "compaction" | "rope" |
"chains"}; :func:`generate` says what a batch may hold.  With "config_only" (and perhaps "env") the
engine's config is made and nothing else.  "watch_pool" asks for a report of :mod:`weights_pool`.
RESULTS: {name: {"batches", "accepted" (drafts, of each batch), "counters", "runner",
"scheduler", "pool"}, or {"error": text}}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import engine_job
import weights_pool


def register_models(directories: set[str]) -> None:
    """Import the models' classes here; vLLM would inspect each in a process of its own, 7 s."""
    from vllm import ModelRegistry

    for directory in directories:
        config = json.loads((Path(directory) / "config.json").read_text())
        for name in config["architectures"]:
            if name == "MRoPEQwen2ForCausalLM":
                import mrope_model

                model_class = mrope_model.MRoPEQwen2ForCausalLM
            else:
                model_class = ModelRegistry.models[name].load_model_cls()
            ModelRegistry.register_model(name, model_class)


def run(job: dict) -> tuple[dict, Any | None]:
    """One engine over its batches: the result, and the engine for the caller to stop."""
    engine = job["engine"]
    # Only the baseline asks for the V2 runner by name.
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    if job.get("plain_v2"):
        engine_job.use_plain_v2(engine)
    os.environ.update(job.get("env", {}))
    from vllm import LLM, EngineArgs

    engine_job.set_async_scheduling(bool(job.get("async")))
    if job.get("config_only"):
        EngineArgs(skip_tokenizer_init=True, **engine).create_engine_config()
        return {"batches": []}, None
    if job.get("break"):
        engine_job.break_something(job["break"])
    watch = weights_pool.watched() if job.get("watch_pool") else contextlib.nullcontext()
    with watch as pool:
        llm = LLM(**engine_job.engine_arguments(job))
    batches, accepted = [], []
    for index, batch in enumerate(job["batches"]):
        make_ready(llm, batch, job["batches"][index - 1], batches)
        batches.append(generate(llm, batch))
        counted = engine_job.counters(llm).get("vllm:spec_decode_num_accepted_tokens", 0)
        accepted.append(counted - sum(accepted))
    core = llm.llm_engine.engine_core.engine_core
    # With several workers they run in processes of their own.
    driver = getattr(core.model_executor, "driver_worker", None)
    runner = None if driver is None else driver.worker.model_runner
    result = {
        "batches": batches,
        "accepted": accepted,
        "counters": engine_job.counters(llm),
        "runner": None if runner is None else type(runner).__name__,
        "scheduler": type(core.scheduler).__name__,
    }
    if pool is not None:
        result["pool"] = weights_pool.report(runner, pool)
    return result, llm


def make_ready(llm: Any, batch: dict, previous: dict, results: list[list[dict]]) -> None:
    """Make a batch's "calls", and put the output so far behind the prompts it "continues"."""
    for name, *arguments in batch.get("calls", ()):
        getattr(llm, name)(*arguments)
    if batch.get("continues"):
        pairs = zip(previous["prompts"], results[-1], strict=True)
        batch["prompts"] = [prompt + result["token_ids"] for prompt, result in pairs]


def generate(llm: Any, batch: dict) -> list[dict]:
    """One batch's outputs.

    Besides "prompts" and "sampling", a batch may name an "embeddings" tensor file (prompts
    become embeddings), LoRA "adapters" [directory] that the requests use in turn, or
    requests to "abort" [indices] once their output has "abort_after" tokens.  Of a batch that
    is "refused" each request is tried alone, and its error returned.  Before a batch come its
    "calls", methods of ``LLM`` with their arguments; one that "continues" goes on where the
    batch before it ended.
    """
    from vllm import SamplingParams

    if batch.get("refused"):
        return [{"error": _error(llm, batch["prompts"][0], p)} for p in batch["sampling"]]

    prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
    if "embeddings" in batch:
        import torch

        table = torch.load(batch["embeddings"], weights_only=True)
        prompts = [{"prompt_embeds": table[ids]} for ids in batch["prompts"]]
    params = [engine_job.sampling_params(SamplingParams, p) for p in batch["sampling"]]
    if "abort" in batch:
        outputs = generate_and_abort(llm, prompts, params, batch["abort"], batch["abort_after"])
    else:
        requests = (
            adapter_requests(batch["adapters"], len(prompts)) if "adapters" in batch else None
        )
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
    return [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": engine_job.logprob_rows(output.outputs[0].logprobs),
            "prompt_logprobs": engine_job.logprob_rows(output.prompt_logprobs),
            "finish": output.outputs[0].finish_reason,
            "stop": output.outputs[0].stop_reason,
            "others": [
                {
                    "token_ids": list(other.token_ids),
                    "finish": other.finish_reason,
                    "stop": other.stop_reason,
                }
                for other in output.outputs[1:]
            ],
            "metrics": (m := output.outputs[0].spec_decode_metrics) and m.to_dict(),
        }
        for output in outputs
    ]


def adapter_requests(directories: list[str], count: int) -> list:
    """LoRA requests of ``count`` requests."""
    from vllm.lora.request import LoRARequest

    made = [LoRARequest(path, i + 1, path) for i, path in enumerate(directories)]
    return [made[index % len(made)] for index in range(count)]


def _error(llm: Any, prompt: list[int], fields: dict) -> str:
    from vllm import SamplingParams

    params = engine_job.sampling_params(SamplingParams, fields)
    try:
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def generate_and_abort(
    llm: Any, prompts: list, params: list, indices: list[int], after: int
) -> list:
    """Drive the engine step by step; aborted requests return what they had last shown."""
    engine = llm.llm_engine
    names = [
        engine.add_request(str(index), prompt, param) or str(index)
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True))
    ]
    latest: dict[str, Any] = {}
    waiting = {str(index): names[index] for index in indices}
    while engine.has_unfinished_requests():
        for output in engine.step():
            latest[output.request_id] = output
            enough = len(output.outputs[0].token_ids) >= after
            if enough and output.request_id in waiting:
                engine.abort_request([waiting.pop(output.request_id)], internal=True)
    return [latest[str(index)] for index in range(len(prompts))]


def stop(llm: Any) -> None:
    """Free an engine's threads and memory for the next one."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def main() -> None:
    """Run the jobs; one that fails does not keep the next from running."""
    results = {}
    jobs = json.loads(Path(sys.argv[1]).read_text())
    register_models({job["engine"]["model"] for job in jobs.values()})
    # vLLM collects 12 times per engine, each time 0.3 s over all that was imported.
    gc.collect = lambda generation=2: 0
    for name, job in jobs.items():
        started = time.monotonic()
        try:
            results[name], llm = run(job)
            if llm is not None:
                stop(llm)
            del llm
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
