"""Training speed and peak memory: heads on cached hidden states, and behind a base on line.

    python benchmarks/bench_training.py --out record.json

Hidden states, labels and the base's weights are random: speed does not depend on them.  Cached:
MedusaOneTrainer, as `vllm-medusa train` runs it, for each shape given as HIDDENxVOCAB.  On line:
JointTrainer without a joint stage, as `vllm-medusa train-joint --joint-epochs 0` runs it, behind
a Llama of 7B parameters in bfloat16.  Tokens are answer tokens; on line every conversation also
has a prompt, whose tokens count in the second rate.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from records import write_record
from variant_training import synchronise

from vllm_medusa.training.base_model import default_device
from vllm_medusa.training.config import TrainConfig
from vllm_medusa.training.conversations import ConversationSet
from vllm_medusa.training.hidden_states import HiddenStateSet
from vllm_medusa.training.joint_config import JointConfig
from vllm_medusa.training.joint_model import JointModel
from vllm_medusa.training.joint_trainer import JointTrainer
from vllm_medusa.training.sequence_batches import SequenceData
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.training.trainer import MedusaOneTrainer

LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
WARM_UP_STEPS = 3


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--shapes", nargs="*", default=["576x49152", "4096x32000"])
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=2**18, help="cached rows")
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-layers", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--online-layers", type=int, default=32, help="of the base; 0: leave out")
    parser.add_argument("--online-hidden", type=int, default=4096)
    parser.add_argument("--micro-batch-sizes", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--compile-base", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=960)
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def measure(trainer: Any, step_tokens: float, seconds: float, device: str) -> dict[str, Any]:
    """Tokens/s over about ``seconds``, behind steps that compile and warm up.

    ``train`` is called anew for every few steps, as often as the time allows; each call's rate
    is kept.
    """
    trainer.train(until_step=WARM_UP_STEPS)
    synchronise(device)
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
        "seconds": round(total, 2), "tokens_per_second_of_parts": [round(r) for r in rates],
    }  # fmt: skip
    if device != "cpu":
        found["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def cached(
    args: argparse.Namespace, shape: str, layers: int, sequential: bool, device: str
) -> dict[str, Any]:
    """Heads on random hidden states that lie on the device."""
    hidden_size, vocab_size = map(int, shape.split("x"))
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
        num_heads=args.num_heads, num_layers=layers, sequential=sequential, epochs=1e6,
        batch_tokens=args.batch_tokens,
    )  # fmt: skip
    heads = TrainableHeads.from_spec(
        config.head_spec(hidden_size, vocab_size), lm_head, device=device
    )
    embeddings = lm_head if sequential else None
    trainer = MedusaOneTrainer(config, data, lm_head, heads=heads, embeddings=embeddings)
    found = measure(trainer, config.batch_tokens, args.seconds, device)
    return {
        "mode": "cached hidden states", "hidden_size": hidden_size, "vocab_size": vocab_size,
        "num_heads": args.num_heads, "num_layers": layers, "sequential": sequential,
        "batch_tokens": config.batch_tokens, "cached_rows": args.rows, **found,
    }  # fmt: skip


def random_llama(args: argparse.Namespace, device: str) -> Any:
    """A Llama of the 7B shape, or of fewer layers, with random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, args.online_hidden // 128)
    shape = {
        **LLAMA_7B, "num_hidden_layers": args.online_layers, "hidden_size": args.online_hidden,
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "intermediate_size": args.online_hidden * 43 // 16,
    }  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)


def online(args: argparse.Namespace, base: Any, micro: int, device: str) -> dict[str, Any]:
    """Heads of one block behind a base that runs in every step."""
    weight = base.get_output_embeddings().weight.detach()
    rng = np.random.default_rng(0)
    count = 4 * micro
    length = args.prompt_tokens + args.answer_tokens
    ids = rng.integers(0, weight.shape[0], (count, length)).astype(np.int32)
    pairs = [(row[: args.prompt_tokens], row[args.prompt_tokens :]) for row in ids]
    rows = micro * args.answer_tokens
    config = JointConfig(
        num_heads=args.num_heads, num_layers=1, joint_epochs=0.0, head_only_epochs=1e6,
        batch_size=micro, micro_batch_size=micro, max_length=length, checkpoint_every=0,
        # Whole chunks only: others are not compiled.
        loss_chunk_rows=rows // max(1, round(rows / 4096)), compile_base=args.compile_base,
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
    found["tokens_per_second_with_prompts"] = round(
        found["tokens_per_second"] * length / args.answer_tokens
    )
    return {
        "mode": "on line", "base_parameters": sum(p.numel() for p in base.parameters()),
        "hidden_size": weight.shape[1], "vocab_size": weight.shape[0],
        "num_heads": args.num_heads, "num_layers": 1, "conversations_a_step": micro,
        "compiled_base": args.compile_base, "prompt_tokens": args.prompt_tokens,
        "answer_tokens": args.answer_tokens, **found,
    }  # fmt: skip


def main() -> None:
    """Measure all, write after each."""
    args = parse_args()
    device = args.device or default_device()
    record: dict[str, Any] = {"benchmark": "training", "rows": []}

    def keep(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        print({k: v for k, v in row.items() if k != "tokens_per_second_of_parts"}, flush=True)
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
        write_record(args.out, record)

    for shape in args.shapes:
        for layers in args.num_layers:
            keep(cached(args, shape, layers, False, device))
        keep(cached(args, shape, args.num_layers[-1], True, device))
    if args.online_layers:
        base = random_llama(args, device)
        for micro in args.micro_batch_sizes:
            keep(online(args, base, micro, device))


if __name__ == "__main__":
    main()
