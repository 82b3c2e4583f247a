"""docs/clusters.md and examples/: numbers are the script's, the manifest is one that fits."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "clusters.md"


def load(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def numbers():
    return load(ROOT / "benchmarks" / "cluster_numbers.py")


def test_the_page_holds_the_script_s_numbers(numbers):
    assert numbers.fill(PAGE.read_text()) == PAGE.read_text(), (
        "run python benchmarks/cluster_numbers.py --write"
    )


def test_bytes_of_a_step(numbers):
    llama = numbers.MODELS[0]
    # 32 layers, two sums each, of 4096 bfloat16 numbers.
    assert numbers.all_reduce_bytes(llama, 1) == 32 * 2 * 4096 * 2
    assert numbers.all_reduce_bytes(llama, 64) == 64 * numbers.all_reduce_bytes(llama, 1)
    # 64 columns of output, two int32 counts and 63 drafts, as vLLM's stages exchange them.
    assert numbers.path_bytes(64) == 64 * 8 + 2 * 4 + 63 * 8


@pytest.mark.parametrize("kind", ["shared", "own", "common"])
def test_head_bytes_are_those_of_real_heads(numbers, kind):
    import torch

    from vllm_medusa.head_weights import HeadSpec
    from vllm_medusa.heads import MedusaHeads

    hidden, vocabulary = 16, 40
    spec = HeadSpec(
        numbers.NUM_HEADS, 1, hidden, vocab_size=vocabulary, dtype=torch.bfloat16,
        own_lm_head=kind != "shared", common_lm_head=kind == "common",
    )  # fmt: skip
    held = sum(p.numel() * p.element_size() for p in MedusaHeads(spec).parameters())
    model = numbers.Model("tiny", 1.0, hidden, 1)
    scored = {"shared": 0, "own": numbers.NUM_HEADS * vocabulary, "common": vocabulary}[kind]
    assert numbers.head_bytes(model, scored, 1) == held


def test_the_record_s_table(numbers, tmp_path):
    def entry(side, rate, heads):
        result = {"concurrency": 8, "tokens_per_s": {"median": rate}, "step_ms": {"median": 9.5}}
        result["collectives"] = {"share": 0.125}
        return {"parallel": "tp2", "side": side, "head_bytes_by_rank": heads, "results": [result]}

    record = {
        "provenance": {"gpus": ["H100", "H100"]},
        "settings": {"model": "M", "dtype": "auto", "executor": "ray"},
        "engines": [entry("plain", 100.0, None), entry("medusa", 190.0, [84e6, 84e6])],
        "comparison": {
            "tp2": {"speedup": {"8": 1.9}, "medusa_equals_one_gpu": {"8": {"equal": 3, "of": 4}}}
        },
    }
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record))
    *_, plain, medusa = numbers.record_table(path).splitlines()
    assert plain == "| tp2 | plain | 8 | 100.0 | 9.50 |  |  | 12% |  |"
    assert medusa == "| tp2 | medusa | 8 | 190.0 | 9.50 | 1.90 | 3 of 4 | 12% | 84.0 MB, 84.0 MB |"


def test_a_page_without_a_place_for_a_table_is_refused(numbers):
    with pytest.raises(ValueError, match="0 places for the table 'traffic'"):
        numbers.fill("# nothing")


def test_paths_of_the_page_exist():
    named = re.findall(r"(?:examples|benchmarks)/[\w./]+\w", PAGE.read_text())
    assert named and all((ROOT / path).exists() for path in named)
    assert "docs/clusters.md" in (ROOT / "README.md").read_text()


def test_kuberay_manifest_fits_its_application(monkeypatch):
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with vLLM")
    manifest = yaml.safe_load((ROOT / "examples" / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    module, function = application["import_path"].split(":")
    assert (ROOT / (module.replace(".", "/") + ".py")).exists() and function == "build"
    arguments = application["args"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    workers = int(arguments["tensor_parallel_size"]) * int(arguments["pipeline_parallel_size"])
    assert workers == gpus
    for pods in (cluster["headGroupSpec"], group):
        spec = pods["template"]["spec"]
        (pod,) = spec["containers"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["volumeMounts"]}
        assert set(mounts) == volumes and mounts["models"] == "/models"
    assert arguments["model"].startswith("/models/") and arguments["heads"].startswith("/models/")


@pytest.fixture
def app(monkeypatch):
    """The application's module, with what it would hand to Ray."""
    library = types.ModuleType("ray.serve.llm")
    library.LLMConfig = lambda **fields: fields
    library.build_openai_app = lambda fields: fields
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "ray.serve.llm", library)
    return load(ROOT / "examples" / "ray_serve_app.py")


def test_serve_application_asks_for_medusa(app):
    given = {"model": "M", "heads": "H", "tensor_parallel_size": "2", "nodes": "31",
             "enforce_eager": "true", "dtype": "float32"}  # fmt: skip
    (config,) = app.build(given)["llm_configs"]
    assert config["model_loading_config"] == {"model_id": "medusa", "model_source": "M"}
    assert config["engine_kwargs"] == {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "dtype": "float32",
        "speculative_config": {"method": "medusa", "model": "H", "num_speculative_tokens": 31},
    }
    with pytest.raises(ValueError, match="give heads"):
        app.build({"model": "M"})


def test_start_script_refuses_a_node_without_the_package(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "examples" / "start_ray_cluster.sh", "worker", "192.0.2.1:6379"],
        env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("ray is not installed for "), done.stderr


def test_start_script_says_how_it_is_called():
    script = ROOT / "examples" / "start_ray_cluster.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "head | worker ADDRESS:PORT" in done.stderr
