"""benchmarks/bench_cluster.py from end to end, on a CPU: two workers without Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_record_of_one_and_two_workers(tiny, tmp_path):
    import tiny_tokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny["model"], model)
    tokenizer = tiny_tokenizer.write_tokenizer(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    out = tmp_path / "record.json"
    options = "--executor mp --parallel tp1 tp2 --concurrency 1 2 --rounds 1 --num-questions 2 "
    options += "--max-tokens 16 --nodes 8 --dtype float32 --max-model-len 1024 --enforce-eager"
    command = [sys.executable, "bench_cluster.py", "--model", str(model)]
    command += ["--heads", tiny["heads"], "--out", str(out), *options.split()]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "VLLM_CPU_CI_ENV": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        command, cwd=BENCHMARKS, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    record = json.loads(out.read_text())
    engines = {f"{e['parallel']} {e['side']}": e for e in record["engines"]}
    assert list(engines) == ["tp1 plain", "tp1 medusa", "tp2 plain", "tp2 medusa"]
    for parallel in ("tp1", "tp2"):
        compared = record["comparison"][parallel]
        assert set(compared["speedup"]) == {"1", "2"}
        for level in ("1", "2"):
            same = compared["medusa_equals_plain"][level]
            assert same["equal"] == same["of"] >= 2
    whole = engines["tp1 medusa"]["head_bytes_by_rank"]
    parts = engines["tp2 medusa"]["head_bytes_by_rank"]
    # Blocks and own lm_heads are cut in two; a part counts its ids besides.
    assert len(whole) == 1 and len(parts) == 2
    assert all(whole[0] / 2 <= part < 0.55 * whole[0] for part in parts)
    # The second call finds everything done.
    again = subprocess.run(
        command, cwd=BENCHMARKS, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and "tok/s" not in again.stdout
