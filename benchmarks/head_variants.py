"""Kinds of heads trained and compared on one base model, in one process.

    python benchmarks/head_variants.py --model MODEL --data g0.safetensors g1.safetensors \
        --work-dir DIR --out record.json --budget-seconds 540

The base is loaded once and its hidden states stay on the device.  Each variant is trained through
the trainers behind `vllm-medusa train` and `train-joint`, exported to DIR/NAME with a tree.json
calibrated on one half of the held-out answers, and evaluated exactly by simulation on the other
half and on greedy MT-Bench answers, which vLLM gives first (for Medusa-2: the changed model's).
Trees are evaluated in processes of their own while the next variant trains; the record is written
after every result, so a run that is cut leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import write_record
from simulate_trees import QUESTIONS
from variant_bases import Base, halves, test_answers
from variant_eval import AnswerRanks, EvaluationJob, evaluate
from variant_plan import OWN_BASE, VARIANTS, Variant, choose
from variant_training import held_out_losses, synchronise, train_heads, train_joint

from vllm_medusa.training.base_model import default_device, load_base
from vllm_medusa.training.calibrate import HeadRanks, rank_labels
from vllm_medusa.training.cli import HELD_OUT_FILE, read_answers
from vllm_medusa.training.trainable_heads import TrainableHeads
from vllm_medusa.tree_candidates import FIRST_RANKS

# What evaluation and export take besides a variant's own seconds.
OVERHEAD_SECONDS = 12


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
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all other lengths")
    parser.add_argument("--held-out", type=int, default=1200, help="answers, half to calibrate on")
    parser.add_argument("--joint-share", type=float, default=0.5,
                        help="of the answers, for heads behind a changed base")  # fmt: skip
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--num-questions", type=int, default=80)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--dynamic-answers", type=int, default=160)
    parser.add_argument("--extract-tokens", type=int, default=65536, help="of a forward pass")
    parser.add_argument("--train", type=json.loads, default={}, help="JSON of TrainConfig fields")
    parser.add_argument("--joint", type=json.loads, default={}, help="JSON of JointConfig fields")
    parser.add_argument("--engine-args", type=json.loads, default=None,
                        help="JSON of vllm.LLM arguments for the test answers")  # fmt: skip
    parser.add_argument("--workers", type=int, default=4, help="processes that evaluate trees")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


class Comparison:
    """State of one run: bases, trained heads, results still being computed, the record."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.device = args.device or default_device()
        self.variants = choose(args.only, args.seconds, args.scale)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        self.servers = ThreadPoolExecutor(2)
        self.pool = ProcessPoolExecutor(
            args.workers, mp_context=multiprocessing.get_context("spawn")
        )
        self.heads: dict[str, TrainableHeads] = {}
        self.record: dict[str, Any] = {"benchmark": "head_variants", "phases": {}, "variants": {}}
        # variants whose test answers are still being served
        self.waiting: list[Variant] = []
        self.calibration: dict[str, HeadRanks] = {}
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
        """Start to answer test questions; load answers and the base; extract hidden states."""
        args = self.args
        test = self._serve(OWN_BASE, args.model)
        answers, held_out = read_answers(args.data, args.model).split(args.held_out, 0)
        held_out.save(args.work_dir / HELD_OUT_FILE)
        model = load_base(args.model, device=self.device)
        base = Base(Path(args.model).name, model, answers, held_out, test, args.extract_tokens)
        self.bases[OWN_BASE] = base
        self.phase("base and answers loaded", answers=len(answers))
        base.hidden("held_out")
        base.hidden("train")
        synchronise(self.device)
        self.phase("hidden states", rows=base.hidden("train").num_rows)
        self.record |= {
            "model": base.name, "answers": len(answers), "training_rows":
            base.hidden("train").num_rows, "held_out_answers": len(held_out),
            "held_out_rows": base.hidden("held_out").num_rows,
            "tokens_extracted": int(answers.offsets[-1]),
            "extraction_seconds": round(base.seconds, 1),
            "nats_per_held_out_token": round(base.nats_per_token(), 5),
        }  # fmt: skip

    def _serve(self, name: str, model: str) -> Future[Any]:
        args = self.args
        engine = args.engine_args
        if engine is None:
            # Beside the training: a small cache of its own, and no share of what is free.
            engine = {"dtype": "bfloat16", "max_model_len": 2048, "enforce_eager": True}
            if self.device != "cpu":
                engine |= {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 3 * 2**30}
        path = args.work_dir / f"mt_bench-{name}.safetensors"
        call = test_answers(
            path, model, args.questions, args.num_questions, args.max_tokens, engine
        )
        return self.servers.submit(call)

    def run(self, variant: Variant) -> None:
        """Train one variant and hand its ranks to the evaluation."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        if variant.start is not None and variant.start not in self.heads:
            print(f"{variant.name}: {variant.start} was not trained here, starting anew")
        start = self.heads.get(variant.start) if variant.start else None
        directory = self.args.work_dir / variant.name
        if variant.joint:
            found = self._run_joint(variant, start, directory)
        else:
            base = self.bases[variant.base]
            self.heads[variant.name], found = train_heads(
                variant, base, start, directory, self.args.train
            )
        if self.device != "cpu":
            found["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        base = self._base(variant)
        heads = self.heads[variant.name]
        found["parameters"] = sum(p.numel() for p in heads.parameters())
        calibration, test = halves(base.hidden("held_out"))
        found["held_out_losses"] = held_out_losses(heads, test, base)
        self.record["variants"][variant.name] = {"base": base.name, "start": variant.start, **found}
        self.calibration[variant.name] = self._rank(variant, calibration, False)
        self.phase(variant.name, steps=found["steps"], rate=found["tokens_per_second"],
                   losses=found["held_out_losses"])  # fmt: skip
        self.waiting.append(variant)
        self.advance()

    def _run_joint(self, variant: Variant, start: Any, directory: Path) -> dict[str, Any]:
        args, own = self.args, self.bases[OWN_BASE]
        heads, model, found = train_joint(
            variant, args.model, self.device, own.train, start, directory, args.joint
        )
        self.heads[variant.name] = heads
        test = self._serve(variant.name, str(directory / "base-medusa2"))
        count = max(1, round(len(own.train) * args.joint_share))
        part = own.train.select(np.arange(count))
        base = Base(variant.name, model, part, own.held_out, test, args.extract_tokens)
        self.bases[variant.name] = base
        nats, before = base.nats_per_token(), self.record["nats_per_held_out_token"]
        found |= {"nats_per_held_out_token": round(nats, 5),
                  "nats_above_the_base": round(nats - before, 5)}  # fmt: skip
        print(f"{variant.name}: {nats - before:+.4f} nats per held-out token", flush=True)
        return found

    def _base(self, variant: Variant) -> Base:
        return self.bases[variant.name if variant.joint else variant.base]

    def _rank(self, variant: Variant, data: Any, with_log_probs: bool) -> HeadRanks:
        base, heads = self._base(variant), self.heads[variant.name]
        sequential = heads.spec.sequential
        return rank_labels(
            heads, data, base.lm_head, FIRST_RANKS,
            embeddings=base.embeddings if sequential else None,
            # A sequential head's probabilities on a path are not known before it is drafted.
            with_log_probs=with_log_probs and not sequential,
        )  # fmt: skip

    def advance(self, wait: bool = False) -> None:
        """Evaluate what has its test answers; collect what is evaluated; write the record."""
        left = []
        for variant in self.waiting:
            base = self._base(variant)
            if not (wait or base.test.done()):
                left.append(variant)
                continue
            self.running[variant.name] = self.pool.submit(evaluate, self._job(variant, base))
        self.waiting = left
        for name, future in list(self.running.items()):
            if wait or future.done():
                self._collect(name, future)
        self.record["seconds"] = round(self.elapsed(), 1)
        write_record(self.args.out, self.record)

    def _job(self, variant: Variant, base: Base) -> EvaluationJob:
        held_out = halves(base.hidden("held_out"))[1]
        groups = np.arange(len(held_out.offsets) - 1)
        tests = {"held_out": AnswerRanks(self._rank(variant, held_out, True), groups)}
        try:
            questions = base.test.result().questions
            ranks = self._rank(variant, base.hidden("test"), True)
            tests["mt_bench"] = AnswerRanks(ranks, questions)
        except ValueError as error:
            print(f"{variant.name}: no test answers: {error}", flush=True)
        return EvaluationJob(
            self.args.work_dir / variant.name, self.calibration.pop(variant.name), tests,
            self.args.dynamic_answers,
        )  # fmt: skip

    def _collect(self, name: str, future: Future[dict[str, Any]]) -> None:
        del self.running[name]
        try:
            table = future.result()
        except Exception as error:
            traceback.print_exc()
            self.record["variants"][name]["evaluation_failed"] = f"{error}"
            return
        self.record["variants"][name]["trees"] = table
        for test, row in table.items():
            for kind in ("static", "dynamic"):
                cells = [f"{n}: {c['tokens_per_step']:.3f}" for n, c in row.get(kind, {}).items()]
                if cells:
                    print(f"    {name}, {test}, {kind}: {', '.join(cells)}", flush=True)

    def all_variants(self) -> None:
        """Run what fits into the budget, in order of worth."""
        for variant in self.variants:
            left = self.args.budget_seconds - self.elapsed()
            if left < variant.seconds + OVERHEAD_SECONDS:
                self.record["variants"][variant.name] = {"skipped": f"{left:.0f} s were left"}
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
                self.record["variants"][variant.name] = {"failed": f"{error}"}
        self.advance(wait=True)
        self.phase("all evaluated")
        write_record(self.args.out, self.record)

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
    run.pool.shutdown()
    run.servers.shutdown()


if __name__ == "__main__":
    main()
