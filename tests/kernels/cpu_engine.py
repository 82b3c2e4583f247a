"""Generate with one of vLLM's runners on a CPU: ``python cpu_engine.py RUNNER MODEL OUT``.

RUNNER: ``v1`` (stock), ``v2`` (fall-backs), ``v2-ngram`` (fall-backs, n-gram drafts) or
``v2-interpreted`` (vLLM's kernels under Triton's interpreter). MODEL is made when it
does not exist. Used by the end-to-end test and by ``benchmarks/bench_cpu_runner.py``.
"""

import json
import os
import sys
from pathlib import Path

VOCAB = 1024
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
NGRAM = {
    "method": "ngram_gpu",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
SEEDED = {"temperature": 0.7, "seed": 5, "max_tokens": 12, "ignore_eos": True}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1}
# Name -> sampling parameters; every runner runs those that its mode allows.
BATCHES = {
    "greedy": GREEDY,
    "greedy, penalties, logprobs": GREEDY | PENALTIES | {"logprobs": 3, "prompt_logprobs": 1},
    "top-k 1": GREEDY | {"temperature": 1.0, "seed": 1, "top_k": 1},
    "seeded": SEEDED,
    "seeded, penalties, min-p, bias": SEEDED
    | PENALTIES
    | {"min_p": 0.02, "logit_bias": {7: 3.0, 9: -100.0}, "min_tokens": 4},
}
NOT_WITH_DRAFTS = {"seeded, penalties, min-p, bias"}
# Every top-k request stops the interpreter.
NOT_INTERPRETED = {"top-k 1"}


def make_model(directory: Path) -> None:
    """Save a random float32 Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)


def prompts(count: int) -> list[dict]:
    """Prompts of different lengths, fixed."""
    return [
        {"prompt_token_ids": [(7 * i + 13 * j) % (VOCAB - 24) + 5 for j in range(10 + 3 * i)]}
        for i in range(count)
    ]


def prepare_v2() -> dict[str, str]:
    """Allow the V2 runner in this process; returns the engine arguments it needs."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if os.environ.get("TRITON_INTERPRET") == "1":
        from types import SimpleNamespace

        from triton.backends import backends

        backends.setdefault("cpu", SimpleNamespace(driver=None))
        return {}
    import vllm.config.vllm as config_module

    # Only the check of the configuration: it asks for Triton, which the fall-backs replace.
    config_module.HAS_TRITON = True
    return {"worker_cls": "cpu_engine_worker.FallbackWorker"}


def make_engine(runner: str, model: Path, **options):
    """Start an engine with the given runner."""
    os.environ.update(SETTINGS)
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "seed": 0}
    arguments |= {"max_num_seqs": 8, "skip_tokenizer_init": True}
    if runner == "v1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    else:
        arguments |= prepare_v2()
    if runner == "v2-ngram":
        from vllm.v1.worker.gpu.spec_decode.ngram import speculator

        # The speculator asks for Triton too; its kernels have fall-backs.
        speculator.HAS_TRITON = True
        arguments["speculative_config"] = NGRAM
    from vllm import LLM

    return LLM(str(model), **arguments, **options)


def run_batches(runner: str, engine) -> dict:
    """Token ids, and log-probabilities where asked for, of every batch."""
    from vllm import SamplingParams

    results = {}
    for name, sampling in BATCHES.items():
        if runner == "v2-ngram" and name in NOT_WITH_DRAFTS:
            continue
        if runner == "v2-interpreted" and name in NOT_INTERPRETED:
            continue
        params = SamplingParams(detokenize=False, **sampling)
        outputs = engine.generate(prompts(4), params, use_tqdm=False)
        results[name] = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [
                [
                    sorted([token, entry.rank, entry.logprob] for token, entry in row.items())
                    for row in (output.outputs[0].logprobs or [])
                    + [row for row in (output.prompt_logprobs or []) if row]
                ]
                for output in outputs
            ],
        }
    return results


def main(runner: str, model: Path, out: Path) -> None:
    """Run everything and write the results as JSON."""
    if not model.exists():
        make_model(model)
    engine = make_engine(runner, model)
    results = run_batches(runner, engine)
    core = engine.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    results["runner"] = type(worker.model_runner).__module__
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
