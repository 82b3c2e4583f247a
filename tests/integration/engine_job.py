"""Run one engine configuration over several batches in a process of its own.

    python engine_job.py JOB.json RESULT.json

JOB: {"engine": {LLM arguments}, "plain_v2": bool, "batches": [{"prompts": [[ids]],
"sampling": [{...}]}], "break": null | "compaction" | "rope" | "chains" | "row kernels",
"whole_steps": bool, "count_row_products": bool, "count_mixed_steps": bool,
"compare_drawn_steps": bool}.
The result holds token ids, logprobs, spec-decode counters and the classes that really ran.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from drawn_steps import compare_drawn_steps

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


COUNTERS = (
    "vllm:num_preemptions",
    "vllm:prefix_cache_hits",
    "vllm:external_prefix_cache_hits",
)


def use_plain_v2(engine: dict) -> None:
    """Stock V2 runner without speculation: what seeded output is compared with on a CPU."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import vllm.config.vllm as config_module

    config_module.HAS_TRITON = True
    engine["worker_cls"] = "plain_v2_worker.PlainV2CPUWorker"


def set_async_scheduling(wanted: bool) -> None:
    """Keep, or no longer keep, vLLM's CPU platform from switching async scheduling off."""
    from vllm.platforms.cpu import CpuPlatform

    original = getattr(CpuPlatform, "_original_check", CpuPlatform.check_and_update_config)
    CpuPlatform._original_check = original

    def check_and_update_config(cls, vllm_config):
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = (
        classmethod(check_and_update_config) if wanted else original
    )


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


def count_laid_out_steps() -> list[int]:
    """Note from now on the sizes of batches whose rows are laid out as trees for a graph."""
    from vllm_medusa.verification_step import VerificationStep

    laid_out, lay_out = [], VerificationStep._lay_out

    def noting(self, hidden_states, input_batch, rows):
        laid_out.append(input_batch.num_reqs)
        return lay_out(self, hidden_states, input_batch, rows)

    VerificationStep._lay_out = noting
    return laid_out


def count_graphs_of_mixed_batches(runner) -> list[int]:
    """Note from now on the rows of batches whose forward pass is a graph for any mix."""
    from vllm_medusa.mixed_graphs import is_mixed

    replayed, run = [], runner.cudagraph_manager.run_fullgraph

    def noting(desc):
        if is_mixed(desc):
            replayed.append(desc.num_tokens)
        return run(desc)

    runner.cudagraph_manager.run_fullgraph = noting
    return replayed


def count_whole_steps(padding: int = 2) -> list[int]:
    """Take the route of the verification graphs, eagerly and padded like a graph's size.

    As a graph does, every step reads the tensors that were there at the first one.
    """
    from vllm_medusa.drawn_step import DrawnStep
    from vllm_medusa.verification_step import VerificationStep

    sizes, captured = [], {}
    try_run = VerificationStep.try_run

    def run(self, compute):
        owners = (self.runner.req_states, self.runner.sampler.sampling_states)
        moving = [t for owner in owners for t in vars(owner).values() if hasattr(t, "gpu")]
        current = [tensor.gpu for tensor in moving]
        for tensor in moving:
            tensor.gpu = captured.setdefault(id(tensor), tensor.gpu)
        compute()
        for tensor, gpu in zip(moving, current, strict=True):
            tensor.gpu = gpu

    def trying(self, hidden_states, input_batch):
        if self.hidden_states is None:
            shape = self.runner.max_num_tokens, hidden_states.shape[1]
            self.hidden_states = hidden_states.new_zeros(shape)
        return try_run(self, hidden_states, input_batch)

    def is_static(self, hidden_states):
        self.hidden_states[: hidden_states.shape[0]] = hidden_states
        return True

    def graph(self, num_reqs, rows):
        most = min(self.runner.max_num_reqs, self.runner.max_num_tokens // rows)
        if num_reqs > most:
            return None
        size = min(num_reqs + padding, most)
        sizes.append(size)
        return size, rows, lambda: run(self, lambda: self.compute(self.hidden_states, size, rows))

    def drawn_graph(self, num_reqs):
        size = min(num_reqs + padding, self.runner.max_num_reqs)
        sizes.append(size)
        return size, lambda: run(self, lambda: self.compute(size))

    VerificationStep.try_run = trying
    VerificationStep._is_static = is_static
    VerificationStep._graph = graph
    DrawnStep._graph = drawn_graph
    return sizes


def count_mixed_steps() -> list[int]:
    """Note from now on how many tree requests are verified in a batch that also prefills."""
    from vllm_medusa.cpu_attention_backend import TreeCPUAttentionBuilder

    mixed, build = [], TreeCPUAttentionBuilder.build

    def noting(self, *args, **kwargs):
        made = build(self, *args, **kwargs)
        rest = getattr(made, "rest", None)
        if rest is not None and rest.max_query_len > 1:
            mixed.append(self.tree_batch.num_tree_reqs)
        return made

    TreeCPUAttentionBuilder.build = noting
    return mixed


def engine_arguments(job: dict) -> dict:
    """``LLM`` arguments of a job; ``"tokenizer": true`` loads the model's tokenizer."""
    arguments = dict(job["engine"])
    if "reasoning_config" in arguments:
        from vllm.config.reasoning import ReasoningConfig

        arguments["reasoning_config"] = ReasoningConfig(**arguments["reasoning_config"])
    skip = not job.get("tokenizer")
    return {"skip_tokenizer_init": skip, "disable_log_stats": False, **arguments}


def count_row_products() -> dict[str, int]:
    """Count what the compiled kernels of a CPU do from now on."""
    from vllm_medusa import cpu_attention_backend, cpu_rows, cpu_tree_rows

    counts = {"products": 0, "tree_attention": 0}

    def counted(name, original):
        def call(*args):
            counts[name] += 1
            return original(*args)

        return call

    cpu_rows.product = counted("products", cpu_rows.product)
    cpu_attention_backend.cpu_tree_rows.tree_attention = counted(
        "tree_attention", cpu_tree_rows.tree_attention
    )
    return counts


def sampling_params(cls, fields: dict):
    """JSON turned a logit bias's token ids into strings, and a grammar into a dictionary."""
    if "structured_outputs" in fields:
        from vllm.sampling_params import StructuredOutputsParams

        constraint = StructuredOutputsParams(**fields["structured_outputs"])
        fields = fields | {"structured_outputs": constraint}
    if "logit_bias" in fields:
        bias = {int(token): value for token, value in fields["logit_bias"].items()}
        fields = fields | {"logit_bias": bias}
    # Stop strings are looked for in text.
    return cls(detokenize="stop" in fields, **fields)


def logprob_rows(rows: list | None) -> list | None:
    """[[token, logprob, rank], ...] per position, sorted; None where there are none."""
    if rows is None:
        return None
    return [
        None if row is None else sorted([token, lp.logprob, lp.rank] for token, lp in row.items())
        for row in rows
    ]


def break_something(part: str) -> None:
    """Take one step out of the plugin, to see that the comparison notices.

    It stays out until the process ends: such a job is the last of its series.
    """
    if part == "compaction":
        from vllm_medusa.compaction import PathCompactor

        PathCompactor.compact = lambda *args, **kwargs: None
    elif part == "row kernels":
        from vllm_medusa import cpu_rows

        def load(folder):
            raise OSError("taken out")

        cpu_rows.load = load
    elif part == "rope":
        from vllm_medusa import runner

        runner.follow_depths = lambda *args: None
    elif part == "chains":
        from vllm_medusa.path_chains import PathChains

        expand = PathChains.expand
        PathChains.expand = lambda self, rows, chained: expand(self, rows, chained & False)


def worker_of(llm):
    """The only worker of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def counters(llm) -> dict:
    """Spec-decode counters of the engine's Prometheus registry."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode"):
            found[metric.name] = getattr(metric, "values", None) or metric.value
        if metric.name in COUNTERS:
            found[metric.name] = metric.value
    return found


def distinct_trees(runner) -> int:
    """Different trees in the runner's request slots; 0 without Medusa."""
    tree_batch = getattr(runner, "tree_batch", None)
    return 0 if tree_batch is None else len(tree_batch.parents.unique(dim=0))


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = job["engine"]
    if job.get("plain_v2"):
        use_plain_v2(engine)
    from vllm import LLM, SamplingParams

    if job.get("break"):
        break_something(job["break"])
    whole_steps = count_whole_steps() if job.get("whole_steps") else []
    laid_out = count_laid_out_steps()
    mixed_steps = count_mixed_steps() if job.get("count_mixed_steps") else []
    row_products = count_row_products() if job.get("count_row_products") else {}
    drawn_steps = compare_drawn_steps() if job.get("compare_drawn_steps") else []
    launches = record_launches() if job.get("record_launches") else {}
    llm = LLM(**engine_arguments(job))
    graphs = []
    if job.get("count_graphs_of_mixed_batches"):
        graphs = count_graphs_of_mixed_batches(worker_of(llm).model_runner)
    results = []
    for batch in job["batches"]:
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        params = [sampling_params(SamplingParams, p) for p in batch["sampling"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append(
            [
                {
                    "token_ids": [list(c.token_ids) for c in output.outputs],
                    "logprobs": logprob_rows(output.outputs[0].logprobs),
                    "finish": output.outputs[0].finish_reason,
                }
                for output in outputs
            ]
        )
    worker = worker_of(llm)
    runner = worker.model_runner
    Path(sys.argv[2]).write_text(
        json.dumps(
            {
                "batches": results,
                "counters": counters(llm),
                "launches": {
                    kernel: {name: sorted(dtypes) for name, dtypes in arguments.items()}
                    for kernel, arguments in launches.items()
                },
                "whole_steps": len(whole_steps),
                "laid_out_steps": len(laid_out),
                "drawn_steps": drawn_steps,
                "mixed_steps": len(mixed_steps),
                "graphs_of_mixed_batches": len(graphs),
                "row_products": row_products,
                "distinct_trees": distinct_trees(runner),
                "worker": f"{type(worker).__module__}.{type(worker).__name__}",
                "runner": f"{type(runner).__module__}.{type(runner).__name__}",
                "scheduler": type(llm.llm_engine.engine_core.engine_core.scheduler).__name__,
                "speculative": repr(llm.llm_engine.vllm_config.speculative_config),
            }
        )
    )


if __name__ == "__main__":
    main()
