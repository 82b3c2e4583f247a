"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from synthetic_checkpoints import D, K, Parts, V, fp8_export, medusa_config, write

from vllm_medusa import __version__
from vllm_medusa.checkpoint import load_heads
from vllm_medusa.checkpoint_save import SAVE_FORMATS
from vllm_medusa.cli import main
from vllm_medusa.cli_heads import TARGET_FORMATS


@pytest.fixture
def heads(tmp_path):
    """Return a C1 directory with a tree."""
    directory = write(tmp_path / "heads", "medusa_lm_head.safetensors", Parts().nested(),
                      medusa_config())
    tree = {"paths": [[0], [1], [0, 0]], "source": "calibration", "expected_tokens_per_step": 2.1}
    (directory / "tree.json").write_text(json.dumps(tree))
    return directory


def test_inspect_json(heads, capsys):
    assert main(["inspect", str(heads), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    expected = {
        "format": "C1", "heads": K, "layers": 1, "hidden_size": D, "vocabulary": V, "bias": True,
        "lm_head": "one own per head", "dtype": "bfloat16", "base_model": "maker/base-7b",
        "tree_nodes": 3, "tree_depth": 2, "tree_source": "calibration",
        "tree_expected_tokens_per_step": 2.1, "parameters": K * (D * D + D + V * D),
    }
    assert expected.items() <= summary.items()
    assert summary["megabytes"] == round(2 * summary["parameters"] / 1e6, 3)
    assert summary["files"] == [str(heads / "medusa_lm_head.safetensors")]


def test_inspect_table(heads, capsys):
    assert main(["inspect", str(heads)]) == 0
    printed = capsys.readouterr().out
    for words in ("TGI v1", "one own per head", "maker/base-7b", "hidden size 8", "calibration"):
        assert words in printed


def test_inspect_shared_heads_without_tree(tmp_path, capsys):
    write(tmp_path, "medusa_lm_head.safetensors", Parts().nested(lm_heads=False))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["lm_head"] == "the base model's"
    assert summary["tree"] is None and summary["vocabulary"] is None
    assert summary["fits"] == "base models with hidden size 8 and any vocabulary"


def test_inspect_refuses_a_tree_that_does_not_fit(heads, capsys):
    (heads / "tree.json").write_text("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    assert main(["inspect", str(heads)]) == 2
    assert "path [0, 0, 0, 0] has depth 4, but there are only 3 heads" in capsys.readouterr().err


def test_convert(heads, tmp_path, capsys):
    target = tmp_path / "vllm"
    assert main(["convert", str(heads), str(target), "--format", "D"]) == 0
    assert "(format C1)" in capsys.readouterr().out
    converted, original = load_heads(target), load_heads(heads)
    assert torch.equal(converted.weight, original.weight)
    assert torch.equal(converted.bias, original.bias)
    assert converted.tree_path.read_bytes() == original.tree_path.read_bytes()


def test_convert_fp8_to_a_dtype(tmp_path):
    write(tmp_path / "fp8", "model.safetensors", fp8_export(Parts(dtype=torch.float32))[0])
    arguments = ["convert", str(tmp_path / "fp8"), str(tmp_path / "out"), "--format", "C1"]
    assert main([*arguments, "--dtype", "float16"]) == 0
    assert load_heads(tmp_path / "out").spec.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "{missing}"], "no such file or directory"),
        (["inspect", "{heads}", "--hidden-size", "16"], "hidden size 8"),
        (["inspect", "{heads}", "--vocab-size", "7"], "vocabulary of 20"),
        (["convert", "{heads}", "{heads}", "--format", "D"], "source's own directory"),
        (["convert", "{heads}", "{missing}", "--format", "C2"], "own lm_heads"),
    ],
)
def test_errors_are_one_sentence_with_status_2(heads, tmp_path, capsys, arguments, words):
    places = {"heads": heads, "missing": tmp_path / "missing"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert printed.err.startswith(f"vllm-medusa {arguments[0]}: ") and words in printed.err


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["convert", "a", "b", "--format", "B"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: vllm-medusa" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_vllm():
    code = (
        "import sys\nfrom vllm_medusa.cli import build_parser\nbuild_parser().format_help()\n"
        "print([name for name in ('torch', 'vllm') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-medusa {__version__}"


def test_formats_offered_are_those_that_can_be_written():
    assert set(TARGET_FORMATS) == set(SAVE_FORMATS)
