"""Run prompts through an engine with data parallelism in a process of its own.

    python dp_job.py JOB.json RESULT.json

JOB: {"engine": {AsyncEngineArgs}, "batches": [{"prompts": [[ids]], "sampling": [{...}]}],
"plain_v2": bool}.  RESULT: {"batches": [[{"token_ids"}]], "accepted": {replica: drafts}} or
{"error"}.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from pathlib import Path

import engine_job

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"


async def answer(engine, name: str, prompt: list[int], params) -> list[int]:
    """Token ids of one request."""
    last = None
    async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
        last = output
    return list(last.outputs[0].token_ids)


def accepted() -> dict[str, int]:
    """Accepted drafts of every replica, as Prometheus has them."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    name = "vllm:spec_decode_num_accepted_tokens"
    return {m.labels["engine"]: m.value for m in get_metrics_snapshot() if m.name == name}


async def run(job: dict) -> dict:
    """All batches, each at once; a batch of one request leaves the other replica idle."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(skip_tokenizer_init=True, **job["engine"]))
    try:
        batches = []
        for number, batch in enumerate(job["batches"]):
            params = [engine_job.sampling_params(SamplingParams, p) for p in batch["sampling"]]
            found = await asyncio.gather(
                *(
                    answer(engine, f"{number}-{i}", prompt, param)
                    for i, (prompt, param) in enumerate(zip(batch["prompts"], params, strict=True))
                )
            )
            batches.append([{"token_ids": ids} for ids in found])
        return {"batches": batches, "accepted": accepted()}
    finally:
        engine.shutdown()


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    if job.get("plain_v2"):
        engine_job.use_plain_v2(job["engine"])
    try:
        result = asyncio.run(run(job))
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
