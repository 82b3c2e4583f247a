"""Every way of speculation that vLLM 0.32 has, and ours: how an engine is asked for it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.checkpoint_save import save_heads
from vllm_medusa.head_weights import HeadWeights

# vLLM as it is without this project; the second hides our stand-in for Triton's CPU backend.
STOCK = {"VLLM_PLUGINS": "", "TRITON_BACKENDS_IN_TREE": "1"}
# vLLM's own Medusa and suffix decoding exist on its first runner only.
STOCK_V1 = STOCK | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
# The order of measuring; sides of --side come after the first.
SIDES = ("dynamic", "tree", "chain", "vllm-medusa", "ngram_gpu", "ngram", "suffix", "draft")


def add_side_option(parser: argparse.ArgumentParser) -> None:
    """``--side``, which :func:`further_sides` reads."""
    parser.add_argument(
        "--side",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a further side with this speculative_config; HEADS in it stands for the heads, as in "
        '\'fixed={"method": "medusa", "model": "HEADS", "adaptive": false}\'',
    )


def further_sides(given: list[str], heads: str) -> dict[str, dict]:
    """Engine arguments of the sides named on the command line."""
    sides = {}
    for text in given:
        name, _, config = text.partition("=")
        config = json.loads(config)
        if config.get("model") == "HEADS":
            config["model"] = heads
        sides[name] = {"speculative_config": config}
    return sides


def heads_of(model: str, heads: str) -> HeadWeights:
    """Heads, checked against their target."""
    target = target_config(model)
    return load_heads(
        heads, hidden_size=target["hidden_size"], vocab_size=target["vocab_size"], base_model=model
    )


def target_config(model: str) -> dict[str, Any]:
    """``config.json`` of the target."""
    return json.loads((Path(model) / "config.json").read_text())


def heads_for_vllm(model: str, heads: str, folder: Path) -> Path:
    """Heads as vLLM's own loader reads them: with an lm_head in the file, one for all heads.

    Heads that share the target's lm_head are given a copy of it.
    """
    weights = heads_of(model, heads)
    if not weights.spec.own_lm_head:
        tied = target_config(model).get("tie_word_embeddings")
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        for path in sorted(Path(model).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118 (no mapping)
                    lm_head = file.get_tensor(name).to(weights.spec.dtype)
        spec = dataclasses.replace(weights.spec, own_lm_head=True, common_lm_head=True)
        weights = dataclasses.replace(weights, spec=spec, lm_head=lm_head[None])
    save_heads(weights, folder, "D")
    return folder


def contenders(args: argparse.Namespace) -> dict[str, tuple[Callable[[], dict], dict[str, str]]]:
    """Side -> (what makes its speculative_config, environment), in the order of measuring."""
    ours = {"method": "medusa", "model": args.heads}
    drafts = {"num_speculative_tokens": args.draft_tokens}
    lookup = drafts | {"prompt_lookup_max": 4, "prompt_lookup_min": 2}

    def num_heads() -> int:
        return heads_of(args.model, args.heads).spec.num_heads

    def chain() -> dict:
        return ours | {"tree": [1] * num_heads()}

    def stock_medusa() -> dict:
        copy = heads_for_vllm(args.model, args.heads, args.out.with_suffix(".heads"))
        return {
            "method": "medusa",
            "model": str(copy),
            "num_speculative_tokens": num_heads(),
        }

    def suffix() -> dict:
        if find_spec("arctic_inference") is None:
            raise RuntimeError("suffix decoding needs arctic-inference, which is not installed")
        return {"method": "suffix"}

    def draft() -> dict:
        if args.draft_model is None:
            raise RuntimeError("no --draft-model given")
        return drafts | {"method": "draft_model", "model": args.draft_model}

    known: dict[str, tuple[Callable[[], dict], dict[str, str]]] = {
        "tree": (lambda: ours | {"tree": "static"}, {}),
        "dynamic": (lambda: ours | {"tree": "dynamic"}, {}),
        "chain": (chain, {}),
        "vllm-medusa": (stock_medusa, STOCK_V1),
        "ngram": (lambda: lookup | {"method": "ngram"}, STOCK),
        "ngram_gpu": (lambda: lookup | {"method": "ngram_gpu"}, STOCK),
        "suffix": (suffix, STOCK_V1),
        "draft": (draft, STOCK),
    }
    chosen: dict[str, tuple[Callable[[], dict], dict[str, str]]] = {}
    for name, extra in further_sides(args.side, args.heads).items():
        config = extra["speculative_config"]
        own = config.get("method") == "medusa"
        chosen[name] = (functools.partial(dict, config), {} if own else STOCK)
    first, rest = SIDES[:1], SIDES[1:]
    return (
        {name: known[name] for name in first if name in args.sides}
        | chosen
        | {name: known[name] for name in rest if name in args.sides}
    )
