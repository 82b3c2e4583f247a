"""The record beside a result names command, code and versions, and is plain JSON."""

import json
import subprocess
import sys

import torch

from vllm_medusa import provenance


def test_record_is_json_and_names_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vllm-medusa", "train", "--seed", "7"])
    record = provenance.collect_provenance(seed=7)
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == ["vllm-medusa", "train", "--seed", "7"]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(record["gpus"]) == torch.cuda.device_count()
    assert record["seed"] == 7


def test_git_sha_is_none_without_git(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.git_sha() is None


def test_uncommitted_changes_are_marked(monkeypatch, tmp_path):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package" / "provenance.py"))
    answers = {"status": " M file.py\n", "rev-parse": "abc123\n"}

    def run(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout=answers[command[3]])

    monkeypatch.setattr(subprocess, "run", run)
    assert provenance.git_sha() == "abc123-dirty"
    answers["status"] = ""
    assert provenance.git_sha() == "abc123"
