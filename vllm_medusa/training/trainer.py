"""MedusaOneTrainer: trains heads on stored hidden states of a frozen base model."""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vllm_medusa.training.config import CONFIG_FILE, TrainConfig
from vllm_medusa.training.hidden_states import HiddenStateSet
from vllm_medusa.training.loss import medusa_one_loss
from vllm_medusa.training.path_tokens import path_embeddings
from vllm_medusa.training.progress import progress_bar
from vllm_medusa.training.run_log import RunLog
from vllm_medusa.training.trainable_heads import TrainableHeads

_STATE_FILE = "trainer_state.pt"


class MedusaOneTrainer:
    """AdamW with warm-up and cosine over shuffled rows; only the heads are trained.

    Master weights and optimiser state are fp32, products run in the dtype of the hidden states.
    The base model is not needed: its hidden states and its lm_head weight are.

    Parameters
    ----------
    config : TrainConfig
    data : HiddenStateSet
        Labels for at least ``config.num_heads`` heads.
    lm_head_weight : Tensor
        [vocab, hidden], same dtype and device as ``data.hidden``.
    output_dir : path, optional
        Where the configuration, the log and resumable states are kept; nothing is written
        without it.
    heads : TrainableHeads, optional
        Heads of another kind, or trained before; new ones on the shared lm_head without it.
    embeddings : Tensor, optional
        [vocab, hidden] input embeddings of the base model, for sequential heads.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: HiddenStateSet,
        lm_head_weight: Tensor,
        output_dir: str | Path | None = None,
        heads: TrainableHeads | None = None,
        embeddings: Tensor | None = None,
    ) -> None:
        if data.num_heads < config.num_heads:
            raise ValueError(
                f"data holds labels for {data.num_heads} heads; expected at least num_heads = "
                f"{config.num_heads}; extract the hidden states again with more heads"
            )
        self.batches_per_epoch = data.num_rows // config.batch_tokens
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"batch_tokens is {config.batch_tokens}; expected at most the {data.num_rows} rows "
                "of the data"
            )
        self.config, self.data, self.lm_head_weight = config, data, lm_head_weight
        self.total_steps = max(1, round(config.epochs * self.batches_per_epoch))
        self.heads = heads or TrainableHeads(
            config.num_heads, config.num_layers, data.hidden.shape[1], data.hidden.device
        )
        self.embeddings = embeddings
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay, fused=data.hidden.device.type == "cuda",
        )  # fmt: skip
        self.step = 0
        self.seconds = 0.0
        # (step, learning rate, mean cross entropy of each head)
        self.history: list[tuple[int, float, list[float]]] = []
        self.output_dir = Path(output_dir) if output_dir is not None else None
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            config.save(self.output_dir / CONFIG_FILE)
        self.log = RunLog(self.output_dir)

    @classmethod
    def resume(
        cls,
        output_dir: str | Path,
        data: HiddenStateSet,
        lm_head_weight: Tensor,
        heads: TrainableHeads | None = None,
        embeddings: Tensor | None = None,
    ) -> "MedusaOneTrainer":
        """Continue from the last state in ``output_dir`` with the configuration kept there."""
        output_dir = Path(output_dir)
        config = TrainConfig.load(output_dir / CONFIG_FILE)
        trainer = cls(config, data, lm_head_weight, output_dir, heads, embeddings)
        state = torch.load(
            output_dir / _STATE_FILE, map_location=data.hidden.device, weights_only=True
        )
        if state["num_rows"] != data.num_rows:
            raise ValueError(
                f"the run in {output_dir} was trained on {state['num_rows']} rows, the data holds "
                f"{data.num_rows}; resume with the same conversations and split"
            )
        trainer.heads.load_state_dict(state["heads"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step, trainer.seconds = state["step"], state["seconds"]
        trainer.history = state["history"]
        trainer.log.cut(trainer.step)
        return trainer

    def save_state(self) -> None:
        """Write a resumable state, first beside and then over the last one."""
        if self.output_dir is None:
            raise ValueError("output_dir is None; expected a folder to save the state in")
        state = {
            "heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "history": self.history,
            "num_rows": self.data.num_rows,
        }  # fmt: skip
        draft = self.output_dir / f"{_STATE_FILE}.part"
        torch.save(state, draft)
        draft.replace(self.output_dir / _STATE_FILE)

    def learning_rate(self, progress: float) -> float:
        """Rate at this step for a share ``progress`` (0 to 1) of the run already done."""
        config = self.config
        warm = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        low = config.final_learning_rate_ratio
        cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return config.learning_rate * warm * cosine

    def train(self, until_step: int | None = None) -> TrainableHeads:
        """Train to the end, or up to ``until_step``, and return the heads."""
        config = self.config
        if self.step == 0:
            self.log.restart()
        last = self.total_steps if until_step is None else min(until_step, self.total_steps)
        started = time.monotonic() - self.seconds
        with progress_bar("training steps", last - self.step) as advance:
            while self.step < last:
                epoch, batch = divmod(self.step, self.batches_per_epoch)
                batches = self.data.batches(config.batch_tokens, config.seed + epoch, batch)
                for hidden, labels in batches:
                    self.seconds = time.monotonic() - started
                    progress = self.step / self.total_steps
                    if config.max_seconds is not None:
                        progress = max(progress, self.seconds / config.max_seconds)
                    if progress >= 1.0 or self.step >= last:
                        last = self.step
                        break
                    self._train_step(hidden, labels, progress)
                    advance(1, self._note())
                    every = config.checkpoint_every
                    if self.output_dir is not None and every and self.step % every == 0:
                        self.save_state()
        self.seconds = time.monotonic() - started
        if self.output_dir is not None:
            self.save_state()
            self.log.plot()
        return self.heads

    def _train_step(self, hidden: Tensor, labels: Tensor, progress: float) -> None:
        config = self.config
        rate = self.learning_rate(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        path = None
        if self.heads.spec.sequential:
            path = path_embeddings(labels, config.num_heads, self.embeddings).to(hidden.dtype)
        targets = labels[:, 1 : config.num_heads + 1]
        inputs = self.heads.loss_inputs(hidden, targets, self.lm_head_weight, path)
        loss, head_losses = medusa_one_loss(
            *inputs, head_weights=config.head_weights, chunk_rows=config.loss_chunk_rows
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), config.grad_clip)
        self.optimizer.step()
        self.step += 1
        # Reading the losses waits for the device, so it is done now and then only.
        if self.step % 50 == 0 or self.step == 1:
            losses = [round(x, 4) for x in head_losses.tolist()]
            self.history.append((self.step, rate, losses))
            self.log.write(self.step, learning_rate=rate, head_losses=losses)

    def _note(self) -> str:
        losses = self.history[-1][2] if self.history else []
        return "loss " + " ".join(f"{x:.2f}" for x in losses)


def short_run(config: TrainConfig, steps: int, rows: int) -> TrainConfig:
    """The same settings for ``steps`` steps over ``rows`` rows; for learning-rate sweeps."""
    return replace(config, epochs=steps * config.batch_tokens / max(rows, 1), max_seconds=None)
