"""JointTrainer: Medusa-2 over one or several processes, resumable bit for bit."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.training.config import CONFIG_FILE
from vllm_medusa.training.joint_config import JointConfig
from vllm_medusa.training.joint_model import JointModel
from vllm_medusa.training.progress import progress_bar
from vllm_medusa.training.run_log import RunLog
from vllm_medusa.training.sequence_batches import SequenceData

STATE_FOLDER = "state"
STEP_FILE = "step.pt"


class JointTrainer:
    """Two stages: heads alone, then heads and backbone, each with its own rate schedule.

    Processes, devices, DDP and FSDP are accelerate's: run the program through
    ``accelerate launch``, with or without its configuration file.

    Parameters
    ----------
    config : JointConfig
    model : JointModel
    data : SequenceData
        With labels for ``config.num_heads`` heads.
    output_dir : path
        Settings, log and resumable states.
    cpu : bool
        Stay on the CPU where a GPU is present.
    """

    def __init__(
        self,
        config: JointConfig,
        model: JointModel,
        data: SequenceData,
        output_dir: str | Path,
        cpu: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, set_seed

        self.config, self.data = config, data
        # While heads are trained alone, the adapter takes part in no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=config.head_only_epochs > 0)
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=[unused])
        per_epoch = data.steps_per_epoch(config.batch_size)
        self.head_only_steps = round(config.head_only_epochs * per_epoch)
        self.total_steps = self.head_only_steps + round(config.joint_epochs * per_epoch)
        world = self.accelerator.num_processes
        if config.batch_size % world:
            raise ValueError(
                f"batch_size is {config.batch_size}; expected a multiple of the {world} processes"
            )
        # Every process must draw its own dropout, and the same one in every run.
        set_seed(config.seed, device_specific=True)
        optimizer = torch.optim.AdamW(
            model.parameter_groups(), lr=config.learning_rate,
            betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        )  # fmt: skip
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._keep_trained_weights_only()
        self.step = 0
        self.output_dir = Path(output_dir)
        self.log = RunLog(None)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            config.save(self.output_dir / CONFIG_FILE)
            self.log = RunLog(self.output_dir, config.tensorboard)

    @property
    def joint_model(self) -> JointModel:
        """The model without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    def _keep_trained_weights_only(self) -> None:
        """States hold trained weights: a frozen backbone of 16 GB would be in every one."""
        if self.accelerator.distributed_type.name == "FSDP":
            return  # accelerate writes the shards of each process itself
        names = {n for n, p in self.joint_model.named_parameters() if p.requires_grad}
        names |= {n for n, _ in self.joint_model.heads.named_buffers(prefix="heads")}

        def save(models: list[Any], weights: list[dict], output_dir: str) -> None:
            kept = {n: t for n, t in weights.pop().items() if n in names}
            if self.accelerator.is_main_process:
                torch.save(kept, Path(output_dir) / "trained.pt")

        def load(models: list[Any], input_dir: str) -> None:
            models.pop()
            kept = torch.load(Path(input_dir) / "trained.pt", map_location="cpu", weights_only=True)
            unexpected = self.joint_model.load_state_dict(kept, strict=False).unexpected_keys
            if unexpected or not {n for n in names if "." in n} >= set(kept):
                raise ValueError(f"{input_dir} holds other weights than the settings ask for")

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(load)

    def save_state(self) -> None:
        """Write a resumable state, beside the last one until it is whole."""
        target = self.output_dir / STATE_FOLDER
        part = target.with_name(f"{STATE_FOLDER}.part")
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        if self.accelerator.is_main_process:
            torch.save({"step": self.step, "conversations": len(self.data)}, part / STEP_FILE)
            old = target.with_name(f"{STATE_FOLDER}.old")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            part.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load_state(self) -> None:
        """Continue where the last state of ``output_dir`` was written."""
        folder = self.output_dir / STATE_FOLDER
        # A run that was killed between the two renames left the last state under this name.
        if not folder.exists():
            folder = folder.with_name(f"{STATE_FOLDER}.old")
        if not folder.exists():
            raise ValueError(f"{self.output_dir} holds no {STATE_FOLDER}; expected a stopped run")
        kept = torch.load(folder / STEP_FILE, weights_only=True)
        if kept["conversations"] != len(self.data):
            raise ValueError(
                f"the run in {self.output_dir} had {kept['conversations']} conversations, the "
                f"data holds {len(self.data)}; resume with the same data and split"
            )
        self.accelerator.load_state(str(folder))
        self.step = kept["step"]
        self.log.cut(self.step)

    def train(self, until_step: int | None = None) -> JointModel:
        """Train to the end, or up to ``until_step``, and return the model."""
        last = self.total_steps if until_step is None else min(until_step, self.total_steps)
        if self.step == 0:
            self.log.restart()
        self.model.train()
        with progress_bar("training steps", last - self.step) as advance:
            while self.step < last:
                advance(1, self._train_step())
                every = self.config.checkpoint_every
                if every and self.step % every == 0:
                    self.save_state()
        self.save_state()
        self.log.plot()
        return self.joint_model

    def _train_step(self) -> str:
        config = self.config
        joint = self.step >= self.head_only_steps
        stage_step = self.step - self.head_only_steps if joint else self.step
        steps = self.total_steps - self.head_only_steps if joint else self.head_only_steps
        factor = config.rate_factor(stage_step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        weight = config.medusa_factor(stage_step, steps) if joint else 1.0
        parts = self._backward(joint, weight)
        if config.grad_clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # Reading the losses waits for the device, so it is done now and then only.
        if self.step % config.log_every and self.step not in (1, self.total_steps):
            return ""
        mean = self.accelerator.reduce(parts, "mean").tolist()
        values = [round(value, 5) for value in mean]
        self.log.write(
            self.step, stage="joint" if joint else "heads", loss=values[0],
            language_model_loss=values[1], head_losses=values[2:],
            learning_rate=config.learning_rate * factor, medusa_weight=weight,
        )  # fmt: skip
        return "loss " + " ".join(f"{value:.2f}" for value in mean)

    def _backward(self, joint: bool, weight: float) -> torch.Tensor:
        """Accumulate gradients of this process's share; -> [2 + num_heads] mean losses."""
        config, accelerator = self.config, self.accelerator
        chosen = self.data.step_indices(self.step, config.batch_size, config.seed)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        batches = list(self.data.batches(mine, config.micro_batch_size))
        sums = torch.zeros(2 + config.num_heads, device=accelerator.device)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            # Processes exchange gradients once a step, with its last forward pass.
            context = nullcontext() if last else accelerator.no_sync(self.model)
            with context:
                batch = batch.to(accelerator.device)
                loss = self.model(batch.input_ids, batch.rows, batch.labels, joint, weight)
                accelerator.backward(loss.total / len(batches))
            parts = [loss.total.detach().reshape(1), loss.language_model.reshape(1), loss.heads]
            sums += torch.cat(parts).to(sums.dtype) / len(batches)
        return sums
