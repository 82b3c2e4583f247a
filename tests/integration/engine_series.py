"""Run several engines after one another in one process, which saves their imports.

    python engine_series.py JOBS.json RESULTS.json

JOBS: {name: job of engine_job.py}, in order; RESULTS: {name: result, or {"error": text}}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import engine_job


def register_models(directories: set[str]) -> None:
    """Import the models' classes here; vLLM would inspect each in a process of its own, 7 s."""
    from vllm import ModelRegistry

    for directory in directories:
        config = json.loads((Path(directory) / "config.json").read_text())
        for name in config["architectures"]:
            if name == "MRoPEQwen2ForCausalLM":
                from mrope_model import MRoPEQwen2ForCausalLM as model_class
            else:
                model_class = ModelRegistry.models[name].load_model_cls()
            ModelRegistry.register_model(name, model_class)


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
        # Only the baseline asks for the V2 runner by name.
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
        started = time.monotonic()
        try:
            results[name], llm = engine_job.run(job)
            stop(llm)
            del llm
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
