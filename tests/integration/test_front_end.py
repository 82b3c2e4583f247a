"""From what a user types to the config, or to one clear sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from vllm_medusa.tree import TokenTree

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent

CASES = {
    "keyword": {"speculative_model": "medusa:HEADS"},
    "dictionary": {"speculative_config": {"method": "medusa", "model": "HEADS"}},
    "short forms": {"spec_method": "medusa", "spec_model": "HEADS", "spec_tokens": 5},
    "widths": {"speculative_config": {"method": "medusa", "model": "HEADS", "tree": [4, 2, 1]}},
    "preset": {
        "speculative_config": {
            "method": "medusa", "model": "HEADS", "tree": "vicuna_33b_stage1",
            "num_heads": 3, "num_speculative_tokens": 1,
        }
    },
    "tree beside heads": {"speculative_model": "medusa:WITH_TREE"},
    "static": {
        "speculative_config": {"method": "medusa", "model": "WITH_TREE", "tree": "static"}
    },
    "chosen trees": {
        "speculative_config": {
            "method": "medusa", "model": "WITH_TREE", "tree": "dynamic", "num_heads": 2,
        }
    },
    "single file": {"speculative_model": "medusa:HEADS/medusa_lm_head.safetensors"},
    "off": {},
    # refused
    "other prefix": {"speculative_model": "eagle:HEADS"},
    "empty path": {"speculative_model": "medusa:"},
    "contradiction": {
        "speculative_model": "medusa:HEADS",
        "speculative_config": {"method": "medusa", "model": "elsewhere"},
    },
    "missing path": {"speculative_model": "medusa:/no/such/heads"},
    "unknown key": {"speculative_config": {"method": "medusa", "model": "HEADS", "depth": 3}},
    "no model": {"speculative_config": {"method": "medusa"}},
    "too deep": {
        "speculative_config": {"method": "medusa", "model": "HEADS", "tree": [1, 1, 1, 1]}
    },
    "no parent": {"speculative_config": {"method": "medusa", "model": "HEADS", "tree": [[0, 1]]}},
    "too many heads": {
        "speculative_config": {"method": "medusa", "model": "HEADS", "num_heads": 9}
    },
    "budget of 128": {
        "speculative_config": {"method": "medusa", "model": "HEADS", "num_speculative_tokens": 128}
    },
    "unknown weights": {
        "speculative_config": {"method": "medusa", "model": "HEADS", "draft_weights": "int4"}
    },
    "wrong hidden size": {"speculative_model": "medusa:NARROW"},
    "not a number": {"speculative_model": "medusa:NAN"},
    "own worker": {"speculative_model": "medusa:HEADS", "worker_cls": "my.Worker"},
    "own scheduler": {"speculative_model": "medusa:HEADS", "scheduler_cls": "my.Scheduler"},
    "fp8 cache": {"speculative_model": "medusa:HEADS", "kv_cache_dtype": "fp8"},
}  # fmt: skip

REFUSED = {
    "other prefix": ["'eagle:", "medusa:<path"],
    "empty path": ["names no heads"],
    "contradiction": ["contradict", "elsewhere"],
    "missing path": ["/no/such/heads"],
    "unknown key": ["'depth'", "num_speculative_tokens"],
    "no model": ["names no heads", '"model"'],
    "too deep": ["depth 4", "3 heads"],
    "no parent": ["[0, 1]"],
    "too many heads": ["num_heads=9", "holds 3"],
    "budget of 128": ["128", "1 to 127"],
    "unknown weights": ["draft_weights='int4'", "auto, float8, unquantised"],
    "wrong hidden size": ["hidden size 32", "64"],
    "not a number": ["NaN"],
    "own worker": ["my.Worker"],
    "own scheduler": ["my.Scheduler"],
    "fp8 cache": ["quantised KV cache"],
}


def broken_heads(heads: Path, root: Path) -> dict[str, Path]:
    """Variants of a checkpoint that a start must refuse."""
    tensors = load_file(heads / "medusa_lm_head.safetensors")
    narrow = {k: (t[:32, :32] if t.ndim == 2 else t[:32]).contiguous() for k, t in tensors.items()}
    poisoned = {k: t.clone() for k, t in tensors.items()}
    poisoned["1.0.linear.weight"][3, 4] = float("nan")
    made = {}
    for name, content in (("NARROW", narrow), ("NAN", poisoned), ("WITH_TREE", tensors)):
        made[name] = root / name
        made[name].mkdir()
        save_file(content, made[name] / "medusa_lm_head.safetensors")
    TokenTree.from_paths([[0], [1], [0, 0]]).save(made["WITH_TREE"] / "tree.json")
    return made


@pytest.fixture(scope="module")
def outcomes(tiny, tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("cases")
    places = {"HEADS": tiny["heads"]} | {
        name: str(path) for name, path in broken_heads(Path(tiny["heads"]), root).items()
    }
    text = json.dumps([{"model": tiny["model"], **case} for case in CASES.values()])
    for name in sorted(places, key=len, reverse=True):
        text = text.replace(name, places[name])
    (root / "cases.json").write_text(text)
    subprocess.run(
        [sys.executable, HERE / "config_cases.py", root / "cases.json", root / "result.json"],
        check=True,
        timeout=300,
    )
    return dict(zip(CASES, json.loads((root / "result.json").read_text()), strict=True))


@pytest.mark.parametrize(
    "case", ["keyword", "dictionary", "short forms", "widths", "preset", "single file"]
)
def test_every_spelling_reaches_the_tree_runner(outcomes, case):
    outcome = outcomes[case]
    assert outcome["method"] == "medusa", outcome
    assert "method='medusa'" in outcome["speculative"]
    assert outcome["worker"] == "vllm_medusa.cpu_worker.MedusaCPUWorker"
    assert outcome["scheduler"] == "vllm_medusa.scheduler.MedusaScheduler"
    assert outcome["v2_runner"]


def test_node_budget_and_trees(outcomes):
    assert outcomes["short forms"]["nodes"] == 5
    assert outcomes["preset"]["paths"] == [[0]]
    assert outcomes["widths"]["nodes"] == 5  # of 20: the CPU's default budget
    assert outcomes["static"]["paths"] == [[0], [1], [0, 0]]
    assert "tree=" not in outcomes["static"]["speculative"]
    # The tree beside the heads says how many nodes, and serves requests that choose none.
    chosen = outcomes["chosen trees"]
    assert chosen["paths"] == [[0], [1], [0, 0]]
    assert "tree_nodes=3, heads=2, tree='dynamic'" in chosen["speculative"]
    default = outcomes["tree beside heads"]
    assert default["paths"] == [[0], [1], [0, 0]]
    assert "tree='dynamic'" in default["speculative"]


def test_off_is_stock(outcomes):
    assert outcomes["off"] == {
        "speculative": "None",
        "method": None,
        "nodes": None,
        "paths": [],
        "worker": "vllm.v1.worker.cpu_worker.CPUWorker",
        "scheduler": None,
        "v2_runner": False,
    }


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_sentence_that_names_it(outcomes, case):
    assert "error" in outcomes[case], outcomes[case]
    for part in REFUSED[case]:
        assert part in outcomes[case]["error"]


def test_sleep_of_level_2_is_told_to_keep_the_heads():
    """reload_weights, which follows it, reads the target's checkpoint only."""
    from vllm_medusa import front_end

    engine_args = SimpleNamespace(
        attention_backend=None,
        attention_config=SimpleNamespace(backend=None),
        worker_cls="auto",
        scheduler_cls=None,
        enable_sleep_mode=True,
        sleep_preserve_parameter_names=["*.frozen"],
    )
    try:
        for _ in range(2):
            front_end.prepare_engine_args(engine_args)
            assert engine_args.sleep_preserve_parameter_names == ["*.frozen", "draft.*"]
    finally:
        front_end.prepare_other_engine()


def test_installed_but_unused_changes_nothing(tiny, run_job):
    """Tokens, log probabilities and classes are the same with the plugin off and on."""
    batch = {
        "prompts": [[5, 6, 7], [8, 9, 10, 11]],
        "sampling": [{"max_tokens": 24, "logprobs": 2, "seed": 3, "temperature": 0.8}] * 2,
    }
    engine = {"model": tiny["model"], "dtype": "float32", "enforce_eager": True}
    engine |= {"max_model_len": 256, "seed": 0}
    installed = run_job(engine, [batch])
    without = run_job(engine, [batch], env={"VLLM_PLUGINS": ""})
    assert installed == without


def test_serve_help_shows_the_flag():
    help_text = subprocess.run(
        [sys.executable, "-c", HELP_SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    ).stdout
    assert "--speculative-model medusa:PATH" in help_text


HELP_SCRIPT = """
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
print(AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).format_help())
"""

VERSION_SCRIPT = """
import logging
from vllm_medusa import plugin, vllm_seams
logging.basicConfig(level=logging.WARNING)
vllm_seams.vllm_version = lambda: "0.33.0"
vllm_seams.RELIED_ON += (("vllm.config.vllm", "VllmConfig.gone_in_0_33"),)
plugin.before_engine_args()
plugin.register()
from vllm.engine.arg_utils import EngineArgs
print("untouched", not hasattr(EngineArgs.add_cli_args, "_vllm_medusa"))
"""


def test_another_vllm_version_is_left_alone_with_a_reason():
    """One sentence, the changed names in it, and no wrapper anywhere."""
    run = subprocess.run(
        [sys.executable, "-c", VERSION_SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_PLUGINS": ""},
    )
    assert "untouched True" in run.stdout, run.stderr[-2000:]
    assert "steps aside on vLLM 0.33.0" in run.stderr + run.stdout
    assert "VllmConfig.gone_in_0_33" in run.stderr + run.stdout


ENGINE_SCRIPT = """
import vllm.v1.engine.async_llm
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
print("requests", hasattr(SamplingParams._validate_spec_decode, "_vllm_medusa"))
print("config", hasattr(VllmConfig.use_v2_model_runner.fget, "_vllm_medusa"))
"""


def test_an_engine_whose_config_was_made_elsewhere_has_the_gates():
    """As in Ray Serve's replicas: no engine arguments, so no general plugin is loaded."""
    run = subprocess.run(
        [sys.executable, "-c", ENGINE_SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert "requests True" in run.stdout and "config True" in run.stdout, run.stderr[-2000:]
