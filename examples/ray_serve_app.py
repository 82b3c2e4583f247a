"""An OpenAI-compatible Ray Serve application whose model drafts with Medusa heads.

    serve run examples.ray_serve_app:build model=MODEL heads=PATH tensor_parallel_size=2

Any further ``name=value`` is an engine argument of vLLM.  ``ray[serve]`` and what Ray's LLM
library imports must be installed: pip install "ray[serve]" pyarrow jsonref hf_transfer
(``ray[llm]`` would bring a vLLM of its own).
"""

from __future__ import annotations

import json
from typing import Any

from ray.serve.llm import LLMConfig, build_openai_app

REPLICAS = 1


def engine_arguments(given: dict[str, str]) -> dict[str, Any]:
    """What vLLM gets: everything but our own keys, numbers and booleans as such.

    Examples
    --------
    >>> engine_arguments({"heads": "H", "tensor_parallel_size": "2"})
    {'tensor_parallel_size': 2, 'speculative_config': {'method': 'medusa', 'model': 'H'}}
    """
    own = {"model", "heads", "name", "replicas", "nodes"}
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        if key in own:
            continue
        try:
            arguments[key] = json.loads(value)
        except (TypeError, ValueError):
            arguments[key] = value
    speculative: dict[str, Any] = {"method": "medusa", "model": given["heads"]}
    if "nodes" in given:
        speculative["num_speculative_tokens"] = int(given["nodes"])
    return arguments | {"speculative_config": speculative}


def build(given: dict[str, str]) -> Any:
    """The application: ``model`` and ``heads`` are required, ``name`` is what clients ask for."""
    missing = {"model", "heads"} - set(given)
    if missing:
        raise ValueError(f"give {' and '.join(sorted(missing))}, as in model=MODEL heads=PATH")
    replicas = int(given.get("replicas", REPLICAS))
    config = LLMConfig(
        model_loading_config={
            "model_id": given.get("name", "medusa"),
            "model_source": given["model"],
        },
        deployment_config={"num_replicas": replicas},
        engine_kwargs=engine_arguments(given),
    )
    return build_openai_app({"llm_configs": [config]})
