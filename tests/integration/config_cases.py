"""Build engine configs for many argument sets in one process and report what came out.

    python config_cases.py CASES.json RESULT.json

CASES: [{engine arguments}]; RESULT: per case the config's fields or the error's text.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main() -> None:
    """Run the cases."""
    # The first EngineArgs of a process takes the keyword, before any plugin was loaded.
    from vllm import EngineArgs

    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        try:
            config = EngineArgs(skip_tokenizer_init=True, **case).create_engine_config()
        except Exception as error:
            results.append({"error": str(error), "type": type(error).__name__})
            continue
        speculative = config.speculative_config
        results.append(
            {
                "speculative": repr(speculative),
                "method": getattr(speculative, "method", None),
                "nodes": getattr(speculative, "num_speculative_tokens", None),
                "paths": [list(p) for p in getattr(speculative, "tree_paths", ())],
                "worker": config.parallel_config.worker_cls,
                "scheduler": config.scheduler_config.scheduler_cls,
                "v2_runner": config.use_v2_model_runner,
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
