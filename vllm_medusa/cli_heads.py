"""Subcommands about head checkpoints: inspect and convert."""

from __future__ import annotations

import argparse
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
# As vllm_medusa.checkpoint_save.SAVE_FORMATS, which --help should not have to import.
TARGET_FORMATS = ("A-safetensors", "C1", "C2", "D", "F", "G", "M")


def add_inspect_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa inspect PATH [--json]``."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a head checkpoint holds",
        description="Read a head checkpoint completely, check it, and show what it holds.",
    )
    parser.add_argument("path", metavar="PATH", help="directory, weights file or hub id")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_load_arguments(parser)
    parser.set_defaults(run=run_inspect)


def add_convert_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``vllm-medusa convert SRC DST --format F``."""
    parser = subparsers.add_parser(
        "convert",
        help="write heads in another format",
        description=(
            "Write heads in another format, bit for bit. C2: TGI v2 and vllm-medusa, shared "
            "lm_head. C1, A-safetensors: TGI v1 and FasterDecoding, own lm_heads. D: vLLM. "
            "F: FR-Spec. G: speculators. M: vllm-medusa, every kind of heads."
        ),
    )
    parser.add_argument("source", metavar="SRC", help="directory, weights file or hub id")
    parser.add_argument("target", metavar="DST", help="new directory")
    parser.add_argument("--format", required=True, choices=TARGET_FORMATS)
    _add_load_arguments(parser)
    parser.set_defaults(run=run_convert)


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="convert weights; default: as stored")
    parser.add_argument(
        "--vocab-size", type=int, help="of the base model, checked against the heads"
    )
    parser.add_argument(
        "--hidden-size", type=int, help="of the base model, checked against the heads"
    )


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print what the checkpoint holds."""
    summary = summarise(_load(arguments, arguments.path))
    if arguments.json:
        import json

        print(json.dumps(summary, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title=arguments.path, show_header=False)
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), _text(value))
    Console().print(table)


def run_convert(arguments: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    from vllm_medusa.checkpoint import convert_heads

    weights = _load(arguments, arguments.source)
    target = convert_heads(weights, arguments.target, arguments.format)
    tree = " with its tree.json" if weights.tree_path else ""
    print(f"{arguments.source} (format {weights.format}) -> {target}{tree}")


def summarise(weights) -> dict[str, Any]:
    """Return what ``inspect`` shows of HeadWeights, as plain JSON values."""
    from vllm_medusa.checkpoint import FORMATS

    spec = weights.spec
    lm_head = {0: "the base model's", 1: "one own for all heads"}
    subset = None
    if spec.vocab_subset_size is not None:
        kind = "per head" if spec.vocab_subset_per_head else "common"
        subset = f"{spec.vocab_subset_size} tokens, {kind}"
    return {
        "format": weights.format,
        "written_by": FORMATS[weights.format],
        "files": [str(file) for file in weights.source_files],
        "base_model": weights.metadata.get("base_model_name_or_path"),
        "fits": _fits(spec),
        "heads": spec.num_heads,
        "layers": spec.num_layers,
        "tied_layers": bool(weights.metadata.get("tied_layers")),
        "hidden_size": spec.hidden_size,
        "vocabulary": spec.vocab_size,
        "vocabulary_subset": subset,
        "lm_head": "one own per head"
        if spec.own_lm_head and not spec.common_lm_head
        else lm_head[spec.num_lm_heads],
        "lm_head_rank": spec.lm_head_rank,
        "sequential": spec.sequential,
        "bias": spec.bias,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "dequantised_from_fp8": bool(weights.metadata.get("dequantised")),
        "parameters": spec.num_parameters,
        "megabytes": round(weights.num_bytes / 1e6, 3),
        **_summarise_tree(weights),
    }


def _fits(spec) -> str:
    vocabulary = "any vocabulary" if spec.vocab_size is None else f"vocabulary {spec.vocab_size}"
    return f"base models with hidden size {spec.hidden_size} and {vocabulary}"


def _summarise_tree(weights) -> dict[str, Any]:
    if weights.tree_path is None:
        return {"tree": None}
    from vllm_medusa.tree import TokenTree

    tree = TokenTree.load(weights.tree_path)
    tree.validate(weights.spec.num_heads, weights.spec.output_size)
    return {
        "tree": str(weights.tree_path),
        "tree_nodes": tree.num_nodes,
        "tree_depth": tree.max_depth,
        "tree_nodes_per_depth": list(tree.nodes_per_depth),
        "tree_source": tree.metadata.get("source"),
        "tree_expected_tokens_per_step": tree.metadata.get("expected_tokens_per_step"),
    }


def _load(arguments: argparse.Namespace, path: str):
    import torch

    from vllm_medusa.checkpoint import load_heads

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    return load_heads(
        path,
        hidden_size=arguments.hidden_size,
        vocab_size=arguments.vocab_size,
        dtype=dtype,
    )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
