"""Training speed and peak memory: heads on cached hidden states, and behind a base on line.

    python benchmarks/bench_training.py --out record.json

Hidden states, labels and the base's weights are random: speed does not depend on them.  Cached:
MedusaOneTrainer, as `vllm-medusa train` runs it, for each shape given as HIDDENxVOCAB.  On line:
JointTrainer without a joint stage, as `vllm-medusa train-joint --joint-epochs 0` runs it, behind
a Llama of 7B parameters in bfloat16, all conversations of one length.  Tokens are answer tokens;
on line every conversation also has a prompt, whose tokens count in the second rate.  Rows that
the record holds already are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from records import write_record
from variant_training import synchronise

from vllm_medusa.provenance import collect_provenance, git_sha
from vllm_medusa.training.base_model import default_device, has_compiled_layers
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import HiddenStateSet
from vllm_medusa.training.joint_config import JointConfig
from vllm_medusa.training.joint_model import JointModel
from vllm_medusa.training.joint_trainer import JointTrainer
from vllm_medusa.training.sequence_batches import SequenceData
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.training.trainer import MedusaOneTrainer

WARM_UP_STEPS = 3


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write or extend")
    parser.add_argument("--shapes", nargs="*", default=["576x49152", "4096x32000"])
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=2**18, help="cached rows")
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-layers", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--online-layers", type=int, default=32, help="of the base; 0: leave out")
    parser.add_argument("--online-shape", default="4096x32000", help="of the base")
    parser.add_argument("--online-heads", nargs="+", default=["4xshared", "5xown"],
                        help="NUMBERxKIND of lm_heads; 5xown: as published heads")  # fmt: skip
    parser.add_argument("--micro-batch-sizes", nargs="+", type=int, default=[16, 8])
    parser.add_argument("--compile-base", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=960)
    parser.add_argument("--device", default=None)
    return parser.parse_args()


class Rows:
    """The rows of one record, by their settings; each is written when it is measured.

    Raises
    ------
    ValueError
        The record was made on another device.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device, self.started = path, device, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        if not path.exists():
            return
        old = json.loads(path.read_text())
        before, now = (_device_names(made) for made in (old["provenance"], collect_provenance()))
        if before != now:
            raise ValueError(f"{path} was made on {before}, this is {now}; choose another --out")
        self.rows = old["rows"]

    def note(self, text: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def __contains__(self, key: dict[str, Any]) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless there is one of these settings, and write the record."""
        if key in self:
            self.note(f"kept: {key}")
            return
        self.note(f"measuring: {key}")
        try:
            # A row's shapes are its own: the compiler is not to find one graph for two of them.
            torch.compiler.reset()
            found = run()
        except torch.OutOfMemoryError as error:
            self.note(f"left out: {str(error).partition('. ')[0]}")
            return
        finally:
            gc.collect()
            if self.device != "cpu":
                torch.cuda.empty_cache()
        self.note(f"{found['tokens_per_second']} tokens/s")
        self.rows.append({**key, "git_sha": git_sha(), **found})
        write_record(self.path, {"benchmark": "training", "rows": self.rows})


def _device_names(provenance: dict[str, Any]) -> list[str]:
    # Without drivers' versions.
    return [name.partition(",")[0] for name in provenance["gpus"]] or [provenance["processor"]]


def measure(trainer: Any, step_tokens: float, seconds: float, device: str) -> dict[str, Any]:
    """Tokens/s over about ``seconds``, behind steps that compile and warm up.

    ``train`` is called anew for every few steps, as often as the time allows; each call's rate
    is kept.
    """
    began = time.monotonic()
    trainer.train(until_step=WARM_UP_STEPS)
    synchronise(device)
    warm_up = time.monotonic() - began
    print(f"compiled and warm after {warm_up:.1f} s", flush=True)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    started, rates, each = time.monotonic(), [], WARM_UP_STEPS
    first = trainer.step
    while time.monotonic() - started < seconds:
        before = time.monotonic()
        trainer.train(until_step=trainer.step + each)
        synchronise(device)
        taken = time.monotonic() - before
        rates.append(each * step_tokens / taken)
        each = max(WARM_UP_STEPS, round(each * seconds / 5 / taken))
    steps = trainer.step - first
    total = time.monotonic() - started
    found = {
        "tokens_per_second": round(steps * step_tokens / total), "steps": steps,
        "seconds": round(total, 2), "warm_up_seconds": round(warm_up, 2),
        "tokens_per_second_of_parts": [round(r) for r in rates],
    }  # fmt: skip
    if device != "cpu":
        found["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def cached(args: argparse.Namespace, key: dict[str, Any], device: str) -> dict[str, Any]:
    """Heads on random hidden states that lie on the device."""
    hidden_size, vocab_size = key["hidden_size"], key["vocab_size"]
    torch.manual_seed(0)
    dtype = torch.bfloat16
    data = HiddenStateSet(
        torch.randn(args.rows, hidden_size, device=device, dtype=dtype),
        torch.randint(
            vocab_size, (args.rows, args.num_heads + 1), device=device, dtype=torch.int32
        ),
        np.array([0, args.rows], np.int64),
    )
    lm_head = torch.randn(vocab_size, hidden_size, device=device, dtype=dtype) * 0.02
    config = TrainConfig(
        num_heads=key["num_heads"], num_layers=key["num_layers"], sequential=key["sequential"],
        epochs=1e6, batch_tokens=args.batch_tokens,
    )  # fmt: skip
    heads = TrainableHeads.from_spec(
        config.head_spec(hidden_size, vocab_size), lm_head, device=device
    )
    embeddings = lm_head if config.sequential else None
    trainer = MedusaOneTrainer(config, data, lm_head, heads=heads, embeddings=embeddings)
    return measure(trainer, config.batch_tokens, args.seconds, device)


def cached_keys(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Settings of the rows on cached hidden states."""
    kinds = [(layers, False) for layers in args.num_layers] + [(args.num_layers[-1], True)]
    for shape in args.shapes:
        hidden_size, vocab_size = map(int, shape.split("x"))
        for layers, sequential in kinds:
            yield {
                "mode": "cached hidden states", "hidden_size": hidden_size,
                "vocab_size": vocab_size, "num_heads": args.num_heads, "num_layers": layers,
                "sequential": sequential, "batch_tokens": args.batch_tokens,
                "cached_rows": args.rows,
            }  # fmt: skip


def random_llama(args: argparse.Namespace, device: str) -> Any:
    """A Llama with random bfloat16 weights; by default Llama-2-7B's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden_size, vocab_size = map(int, args.online_shape.split("x"))
    heads = max(1, hidden_size // 128)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=hidden_size * 43 // 16,
        num_hidden_layers=args.online_layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def online(args: argparse.Namespace, key: dict[str, Any], base: Any, device: str) -> dict[str, Any]:
    """Heads of one block behind a base that runs in every step."""
    weight = base.get_output_embeddings().weight.detach()
    rng = np.random.default_rng(0)
    micro = key["conversations_a_step"]
    length = args.prompt_tokens + args.answer_tokens
    ids = rng.integers(0, weight.shape[0], (4 * micro, length)).astype(np.int32)
    pairs = [(row[: args.prompt_tokens], row[args.prompt_tokens :]) for row in ids]
    rows = micro * args.answer_tokens
    config = JointConfig(
        num_heads=key["num_heads"], num_layers=key["num_layers"], lm_head=key["lm_head"],
        joint_epochs=0.0, head_only_epochs=1e6, batch_size=micro, micro_batch_size=micro,
        max_length=length, checkpoint_every=0, compile_base=args.compile_base,
        # Whole chunks only: others are not compiled.
        loss_chunk_rows=rows // max(1, round(rows / 4096)),
    )  # fmt: skip
    data = SequenceData(ConversationSet.from_pairs(pairs), config.num_heads, config.max_length)
    heads = TrainableHeads.from_spec(
        config.head_spec(weight.shape[1], weight.shape[0]), weight, device=device
    )
    with TemporaryDirectory(prefix="bench-training-") as folder:
        model = JointModel(base, heads, config)
        trainer = JointTrainer(config, model, data, folder, cpu=device == "cpu")
        # Between measured parts no state is to be written and nothing to be drawn.
        trainer.save_state = trainer.log.plot = lambda: None
        found = measure(trainer, micro * args.answer_tokens, args.seconds, device)
    return {
        "base_parameters": sum(p.numel() for p in base.parameters()),
        # False where compiling failed.
        "compiled_base": has_compiled_layers(base), **found,
        "tokens_per_second_with_prompts": round(
            found["tokens_per_second"] * length / args.answer_tokens
        ),
    }  # fmt: skip


def online_keys(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Settings of the rows behind a base."""
    hidden_size, vocab_size = map(int, args.online_shape.split("x"))
    for micro in args.micro_batch_sizes:
        for kind in args.online_heads:
            number, lm_head = kind.split("x")
            yield {
                "mode": "on line", "base_layers": args.online_layers,
                "hidden_size": hidden_size, "vocab_size": vocab_size,
                "num_heads": int(number), "num_layers": 1, "lm_head": lm_head,
                "conversations_a_step": micro, "compiled_base": args.compile_base,
                "prompt_tokens": args.prompt_tokens, "answer_tokens": args.answer_tokens,
            }  # fmt: skip


def main() -> None:
    """Measure what the record does not hold yet."""
    args = parse_args()
    device = args.device or default_device()
    rows = Rows(args.out, device)
    for key in cached_keys(args):
        rows.add(key, lambda key=key: cached(args, key, device))
    keys = list(online_keys(args)) if args.online_layers else []
    if all(key in rows for key in keys):
        return
    base = random_llama(args, device)
    rows.note("base made")
    for key in keys:
        rows.add(key, lambda key=key: online(args, key, base, device))


if __name__ == "__main__":
    main()
