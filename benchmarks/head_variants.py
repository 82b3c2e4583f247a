"""Kinds of heads trained and compared on one base model, in one process.

    python benchmarks/head_variants.py --model MODEL --data g0.safetensors g1.safetensors \
        --work-dir DIR --out record.json --budget-seconds 540 --trained plain-3-blocks=HEADS

The base is loaded once and its hidden states stay on the device.  Each variant is trained through
the trainers behind `vllm-medusa train` and `train-joint`, exported to DIR/NAME with a tree.json
calibrated on one half of the held-out answers, and evaluated exactly by simulation on the other
half and on the model's own greedy answers to MT-Bench questions (for Medusa-2: the changed
model's).  Trees are evaluated in processes of their own while the next variant trains.  The record
is written after every variant, so a run that is cut leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from greedy_answers import chosen_questions, own_answers
from records import write_record
from simulate_trees import BUDGETS, QUESTIONS
from transformers import AutoTokenizer
from variant_bases import Base, first_answers, halves, rows_of
from variant_eval import AnswerRanks, EvaluationJob, evaluate
from variant_plan import OWN_BASE, VARIANTS, Variant, choose
from variant_pools import places_in_pool
from variant_training import held_out_losses, synchronise, train_heads, train_joint

from vllm_medusa.heads import MedusaHeads
from vllm_medusa.training.base_model import (
    compile_layers,
    default_device,
    load_base,
    load_heads_for,
)
from vllm_medusa.training.calibrate import HeadRanks, rank_labels, search_tree
from vllm_medusa.training.cli import HELD_OUT_FILE, read_answers
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.tree_candidates import FIRST_RANKS

# What export, held-out losses and ranks take besides a variant's own seconds, and what adapters,
# a merged base and its answers take besides those.
OVERHEAD_SECONDS, JOINT_SECONDS = 8, 22
# Trees of the last variants may take so long behind the budget.
PATIENCE_SECONDS = 30


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model directory")
    parser.add_argument("--data", required=True, nargs="+", help="answers of vllm-medusa distill")
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--work-dir", type=Path, required=True, help="heads and test answers")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    names = ", ".join(v.name for v in VARIANTS)
    parser.add_argument("--only", nargs="+", default=[], help=f"some of: {names}")
    parser.add_argument("--seconds", nargs="+", default=[], help="NAME=SECONDS of training")
    parser.add_argument("--trained", nargs="*", default=[], metavar="NAME=DIR",
                        help="heads to evaluate and start from, not to train")  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all other lengths")
    parser.add_argument("--held-out", type=int, default=800, help="answers, half to calibrate on")
    parser.add_argument("--joint-share", type=float, default=0.5,
                        help="of the answers, for heads behind a changed base")  # fmt: skip
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--num-questions", type=int, default=80)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dynamic-answers", type=int, default=160)
    parser.add_argument("--extract-tokens", type=int, default=65536, help="of a forward pass")
    parser.add_argument("--train", type=json.loads, default={}, help="JSON of TrainConfig fields")
    parser.add_argument("--joint", type=json.loads, default={}, help="JSON of JointConfig fields")
    parser.add_argument("--compile-base", action="store_true", help="before it is run")
    parser.add_argument("--workers", type=int, default=3, help="processes that evaluate trees")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


class Comparison:
    """State of one run: bases, trained heads, results still being computed, the record."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.device = args.device or default_device()
        self.trained = dict(item.split("=", 1) for item in args.trained)
        self.variants = choose(args.only, args.seconds, args.scale, tuple(self.trained))
        self.questions = chosen_questions(args.questions, args.num_questions, 1)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        self.pool = ProcessPoolExecutor(
            args.workers, mp_context=multiprocessing.get_context("spawn")
        )
        self.heads: dict[str, TrainableHeads] = {}
        self.record: dict[str, Any] = {"benchmark": "head_variants", "phases": {}, "variants": {}}
        self.running: dict[str, Future[dict[str, Any]]] = {}
        self.bases: dict[str, Base] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def phase(self, name: str, **values: Any) -> None:
        """Note when something was done."""
        self.record["phases"][name] = round(self.elapsed(), 1)
        print(f"[{self.elapsed():6.1f} s] {name} {values or ''}", flush=True)

    def prepare(self) -> None:
        """Load answers and the base; extract hidden states; evaluate heads trained before."""
        args = self.args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        answers, held_out = read_answers(args.data, args.model).split(args.held_out, 0)
        held_out.save(args.work_dir / HELD_OUT_FILE)
        model = load_base(args.model, device=self.device)
        if args.compile_base:
            compile_layers(model)
        base = self._add_base(OWN_BASE, Path(args.model).name, model, answers, held_out)
        self.phase("base and answers loaded", answers=len(answers))
        self.record |= {
            "model": base.name, "answers": len(answers), "held_out_answers": len(held_out),
            "held_out_rows": base.hidden("held_out").num_rows,
            "tokens_extracted": int(answers.offsets[-1]),
            "num_questions": len(self.questions), "max_tokens": args.max_tokens,
            "nats_per_held_out_token": round(base.nats_per_token(), 5),
        }  # fmt: skip
        self.phase("held-out answers", nats=self.record["nats_per_held_out_token"])
        for name, directory in self.trained.items():
            weights = load_heads_for(model, directory)
            self.heads[name] = TrainableHeads.from_weights(weights).to(model.device)
            self._hand_over(name, base, {"heads": Path(directory).name})
        if any(variant.base == OWN_BASE and not variant.joint for variant in self.variants):
            base.hidden("train")
            synchronise(self.device)
            self.record |= {
                "training_rows": base.hidden("train").num_rows,
                "extraction_seconds": round(base.seconds, 1),
            }
            self.phase("hidden states", rows=base.hidden("train").num_rows)

    def _add_base(self, key: str, name: str, model: Any, answers: Any, held_out: Any) -> Base:
        def answer(changed: Any) -> Any:
            path = self.args.work_dir / f"mt_bench-{key}.safetensors"
            return own_answers(path, self.questions, changed, self.tokenizer, self.args.max_tokens)

        base = Base(name, model, answers, held_out, answer, self.args.extract_tokens)
        self.bases[key] = base
        return base

    def run(self, variant: Variant) -> None:
        """Train one variant and hand its ranks to the evaluation."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        if variant.start is not None and variant.start not in self.heads:
            print(f"{variant.name}: {variant.start} was not trained here, starting anew")
        start = self.heads.get(variant.start) if variant.start else None
        directory = self.args.work_dir / variant.name
        if variant.joint:
            base, found = self._run_joint(variant, start, directory)
        else:
            base = self.bases[variant.base]
            self.heads[variant.name], found = train_heads(
                variant, base, start, directory, self.args.train
            )
        if self.device != "cpu":
            found["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self._hand_over(variant.name, base, {"base": base.name, "start": variant.start, **found})

    def _run_joint(
        self, variant: Variant, start: Any, directory: Path
    ) -> tuple[Base, dict[str, Any]]:
        args, own = self.args, self.bases[OWN_BASE]
        heads, model, found = train_joint(
            variant, args.model, self.device, own.train, start, directory, args.joint
        )
        self.heads[variant.name] = heads
        part = first_answers(own.train, args.joint_share)
        base = self._add_base(variant.name, variant.name, model, part, own.held_out)
        nats, before = base.nats_per_token(), self.record["nats_per_held_out_token"]
        found |= {"nats_per_held_out_token": round(nats, 5),
                  "nats_above_the_base": round(nats - before, 5)}  # fmt: skip
        print(f"{variant.name}: {nats - before:+.4f} nats per held-out token", flush=True)
        return base, found

    def _hand_over(self, name: str, base: Base, found: dict[str, Any]) -> None:
        """Rank the right tokens under trained heads, let a process evaluate trees, record."""
        heads, started = self.heads[name], time.monotonic()
        calibration, held_out = halves(base.hidden("held_out"))
        spec = heads.spec
        self.record["variants"][name] = {
            **found, "num_heads": spec.num_heads, "num_layers": spec.num_layers,
            "sequential": spec.sequential, "parameters": sum(p.numel() for p in heads.parameters()),
            "held_out_losses": held_out_losses(heads, held_out, base),
        }  # fmt: skip
        write_record(self.args.out, self.record)
        (self.args.work_dir / name).mkdir(exist_ok=True)
        groups = np.arange(len(held_out.offsets) - 1)
        few = rows_of(held_out, 0, min(self.args.dynamic_answers, len(groups)))
        chosen = None if spec.sequential else self._rank(base, heads, few, True)
        ranks = self._rank(base, heads, base.hidden("test"), True)
        known = self._rank(base, heads, calibration)
        places = self._places(base, heads, known, ranks) if spec.sequential else None
        tests = {
            "held_out": AnswerRanks(self._rank(base, heads, held_out), groups, chosen),
            "mt_bench": AnswerRanks(ranks, base.test.questions, ranks, places),
        }
        job = EvaluationJob(self.args.work_dir / name, known, tests)
        self.running[name] = self.pool.submit(evaluate, job)
        self.phase(name, ranked_in=round(time.monotonic() - started, 1),
                   rate=found.get("tokens_per_second"),
                   losses=self.record["variants"][name]["held_out_losses"])  # fmt: skip
        self.collect()

    def _places(
        self, base: Base, heads: TrainableHeads, known: HeadRanks, ranks: HeadRanks
    ) -> np.ndarray:
        weights = heads.to_weights(base.lm_head.shape[0], base.lm_head.dtype)
        return places_in_pool(
            MedusaHeads.from_weights(weights, base.lm_head.device),
            search_tree(known, BUDGETS[-1]).paths, base.hidden("test"), ranks.ranks,
            base.embeddings, base.lm_head,
        )  # fmt: skip

    def _rank(
        self, base: Base, heads: TrainableHeads, data: Any, log_probs: bool = False
    ) -> HeadRanks:
        sequential = heads.spec.sequential
        return rank_labels(
            heads, data, base.lm_head, FIRST_RANKS,
            embeddings=base.embeddings if sequential else None,
            # A sequential head's probabilities on a path are not known before it is drafted.
            with_log_probs=log_probs and not sequential,
        )  # fmt: skip

    def collect(self, wait_until: float = 0.0) -> None:
        """Take over what is evaluated, waiting up to that many seconds since the start."""
        for name, future in list(self.running.items()):
            left = max(0.0, wait_until - self.elapsed())
            if future.done() or left:
                del self.running[name]
                self._take(name, future, left)
        self.record["seconds"] = round(self.elapsed(), 1)
        write_record(self.args.out, self.record)

    def _take(self, name: str, future: Future[dict[str, Any]], patience: float) -> None:
        row = self.record["variants"][name]
        try:
            row["trees"] = future.result(patience)
        except Exception as error:
            traceback.print_exc()
            row["evaluation_failed"] = repr(error)
            return
        for test, found in row["trees"].items():
            for kind in ("static", "dynamic"):
                cells = [f"{n}: {c['tokens_per_step']:.3f}" for n, c in found.get(kind, {}).items()]
                if cells:
                    print(f"    {name}, {test}, {kind}: {', '.join(cells)}", flush=True)

    def all_variants(self) -> None:
        """Run what fits into the budget, in order of worth."""
        for variant in self.variants:
            left, needed = self.args.budget_seconds - self.elapsed(), self._needed(variant)
            if left < needed:
                skipped = f"{left:.0f} s were left, {needed:.0f} needed"
                self.record["variants"][variant.name] = {"skipped": skipped}
                continue
            if variant.base not in self.bases:
                self.record["variants"][variant.name] = {"skipped": f"no {variant.base}"}
                continue
            if variant.base == OWN_BASE:
                self._drop_changed_bases()
            try:
                self.run(variant)
            except Exception as error:
                # The other variants' time must not be lost with this one.
                traceback.print_exc()
                self.record["variants"].setdefault(variant.name, {})["failed"] = repr(error)
        self.collect(max(self.args.budget_seconds, self.elapsed()) + PATIENCE_SECONDS)
        self.phase("all evaluated")
        write_record(self.args.out, self.record)

    def _needed(self, variant: Variant) -> float:
        """Seconds that a variant takes in all, by what the base's hidden states took."""
        base, own = self.bases.get(variant.base), self.bases[OWN_BASE]
        seconds = variant.seconds + OVERHEAD_SECONDS + JOINT_SECONDS * variant.joint
        if not variant.joint and base is not None and not base.has_hidden("train"):
            seconds += own.seconds * self.args.joint_share
        return seconds

    def _drop_changed_bases(self) -> None:
        for name, base in self.bases.items():
            if name != OWN_BASE:
                base.drop_training_data()


def main() -> None:
    """Prepare, train, evaluate, record."""
    logging.basicConfig(level=logging.WARNING)
    args = parse_args()
    # Adapters are float32 beside a bfloat16 base; their products may take TF32.
    torch.set_float32_matmul_precision("high")
    run = Comparison(args)
    run.prepare()
    run.all_variants()
    run.pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
