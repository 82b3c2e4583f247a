"""JointModel: a backbone, with an adapter or whole, and heads; its forward is the joint loss."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_medusa.training.base_model import compile_layers, run_base
from vllm_medusa.training.joint_config import JointConfig
from vllm_medusa.training.joint_loss import chunked_mean, cross_entropy, divergence
from vllm_medusa.training.loss import medusa_one_loss
from vllm_medusa.training.path_tokens import path_embeddings
from vllm_medusa.training.trainable_heads import TrainableHeads


class JointLoss(NamedTuple):
    """Loss to descend and its parts."""

    total: Tensor
    # L_LM, or the KL divergence from the teacher; 0 in the stage of heads alone
    language_model: Tensor
    # [num_heads] mean cross entropies
    heads: Tensor


class JointModel(nn.Module):
    """Everything is inside one ``forward``, so that DDP and FSDP see one module.

    Parameters
    ----------
    base
        A transformers causal language model.
    heads : TrainableHeads
    config : JointConfig
        With ``lora_rank`` the base gets an adapter, whose weights alone are trained.
    """

    def __init__(self, base: Any, heads: TrainableHeads, config: JointConfig) -> None:
        super().__init__()
        self.config = config
        base.requires_grad_(False)
        self.adapter = None
        if config.joint_epochs > 0 and config.lora_rank > 0:
            self.adapter = _add_adapter(base, config)
        elif config.joint_epochs > 0:
            base.requires_grad_(True)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            # Checkpointed blocks need an input with a gradient; the frozen embeddings give none.
            base.enable_input_require_grads()
        self.base = compile_layers(base, dynamic=None) if config.compile_base else base
        self.heads = heads

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone and heads for the optimiser; *all* head parameters get the larger rate.

        The published code gave the biases the backbone's rate, as an accident of its name
        matching.
        """
        rate, config = self.config.learning_rate, self.config
        heads = {"params": list(self.heads.parameters()), "name": "heads",
                 "base_lr": rate * config.head_lr_multiplier}  # fmt: skip
        body = {"params": self.backbone_parameters(), "name": "backbone", "base_lr": rate}
        return [heads, *([body] if body["params"] else [])]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Trained weights besides the heads'."""
        return [parameter for parameter in self.base.parameters() if parameter.requires_grad]

    def without_adapter(self) -> AbstractContextManager[None]:
        """The teacher: the same model with its adapter switched off and without dropout."""
        return nullcontext() if self.adapter is None else _disabled(self.adapter)

    def forward(
        self,
        # [conversations, length] int64
        input_ids: Tensor,
        # [rows] int64 into the flattened positions
        rows: Tensor,
        # [rows, num_heads + 1] int64
        labels: Tensor,
        joint: bool,
        # lambda_0 of this step; the heads' loss counts whole in the stage of heads alone
        medusa_weight: float = 1.0,
    ) -> JointLoss:
        """``L_LM + lambda_0 * sum_k lambda_k CE_k``, or the sum alone."""
        with nullcontext() if joint else torch.no_grad():
            hidden = self._hidden(input_ids, rows)
        head_loss, head_losses = self._head_loss(hidden, labels)
        if not joint:
            return JointLoss(head_loss, torch.zeros_like(head_loss), head_losses.detach())
        language_model = self._language_model_loss(hidden, input_ids, rows, labels[:, 0])
        total = language_model + medusa_weight * head_loss
        return JointLoss(total, language_model.detach(), head_losses.detach())

    def _hidden(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        # [rows, hidden]
        return run_base(self.base, input_ids).flatten(0, 1)[rows]

    def _head_loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        path = None
        if self.heads.spec.sequential:
            table = self.base.get_input_embeddings().weight.detach()
            path = path_embeddings(labels, config.num_heads, table).to(hidden.dtype)
        # Detached: the heads follow a shared lm_head, only L_LM may move it.
        lm_head = self.base.get_output_embeddings().weight.detach().to(hidden.dtype)
        inputs = self.heads.loss_inputs(hidden, labels[:, 1:], lm_head, path)
        return medusa_one_loss(
            *inputs, head_weights=config.head_weights, chunk_rows=config.loss_chunk_rows
        )

    def _language_model_loss(
        self, hidden: Tensor, input_ids: Tensor, rows: Tensor, labels: Tensor
    ) -> Tensor:
        lm_head = self.base.get_output_embeddings()
        chunk = self.config.loss_chunk_rows
        if not self.config.self_distillation:
            return chunked_mean(lambda h, y: cross_entropy(lm_head(h), y), (hidden,), labels, chunk)
        with torch.no_grad(), self.without_adapter():
            teacher = self._hidden(input_ids, rows)

        def loss(student_hidden: Tensor, teacher_hidden: Tensor, chunk_labels: Tensor) -> Tensor:
            with torch.no_grad(), self.without_adapter():
                wanted = lm_head(teacher_hidden)
            return divergence(lm_head(student_hidden), wanted, chunk_labels)

        return chunked_mean(loss, (hidden, teacher), labels, chunk)


def _add_adapter(base: Any, config: JointConfig) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.quantise != "none":
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    missing = [target for target in config.lora_targets if target not in names]
    if missing:
        raise ValueError(
            f"lora_targets names {missing}, which {type(base).__name__} has not; expected names "
            f"of its linear layers, e.g. {sorted(n for n in names if n.endswith('proj'))}"
        )
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    # Layers are replaced inside ``base``; the wrapper only switches and saves them. It is kept
    # in a list, so that its parameters are not registered a second time.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return [get_peft_model(base, lora)]


@contextmanager
def _disabled(adapter: list[Any]):
    model = adapter[0]
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)
