"""Medusa's proposer: the heads read one hidden row per request and fill the next tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.draft_vocabulary import cut_lm_head, later_size
from vllm_medusa.draft_weights import Float8Weight, PlainWeight
from vllm_medusa.dynamic_tree import DynamicDrafter
from vllm_medusa.embedding_table import embedding_table
from vllm_medusa.float8_heads import Float8Heads
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.heads import MedusaHeads
from vllm_medusa.kernels import DraftWorkspace, DrawNoise, draft_tree
from vllm_medusa.prompt_lookup import PromptLookup
from vllm_medusa.rank_agreement import on_every_rank
from vllm_medusa.sequential_draft import ChosenSequentialDrafter, SequentialDrafter
from vllm_medusa.sequential_heads import SequentialHeads
from vllm_medusa.sharded_draft import ShardedDraft, shard_heads
from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.tree_candidates import NOISE_SPREAD

if TYPE_CHECKING:
    from vllm_medusa.verification_step import VerificationStep

logger = init_logger(f"vllm.{__name__}")


class MedusaProposer(DraftModelSpeculator):
    """Drafts trees from independent heads (paper section 2.1) or sequential ones.

    A ``DraftModelSpeculator`` so that vLLM loads, reloads and wakes the heads with
    the target; it has no attention layers and no KV cache of its own.

    Attributes
    ----------
    verification_step : VerificationStep or None
        Set by the runner; recorded when vLLM captures this speculator's graphs.
    step_graphs, drawn_graphs : CudaGraphManager or None
        Its graphs, and those of its ``drawn_step``.  Here because vLLM looks for a speculator's
        graph managers when it throws away the captures that only measured memory.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        tree_batch: TreeBatch,
        req_states: Any,  # vllm.v1.worker.gpu.states.RequestState
    ):
        super().__init__(vllm_config, device)
        self.tree_batch = tree_batch
        self.req_states = req_states
        self.drafter: SequentialDrafter | ChosenSequentialDrafter | DynamicDrafter | None = None
        self.workspace: DraftWorkspace | None = None
        self.sharded: ShardedDraft | None = None
        self.verification_step: VerificationStep | None = None
        self.step_graphs: CudaGraphManager | None = None
        self.drawn_graphs: CudaGraphManager | None = None
        tree = tree_batch.tree
        self.num_heads = self.speculative_config.num_medusa_heads
        self.num_top = tree.max_rank + 1
        self.no_drafts = torch.full(
            (self.max_num_reqs, tree.num_nodes), -1, dtype=torch.int64, device=device
        )
        # node -> column of the flattened [heads, ranks] top-k table
        self.node_columns = torch.tensor(
            [
                (depth - 1) * self.num_top + rank
                for depth, rank in zip(tree.depths[1:], tree.ranks[1:], strict=True)
            ],
            dtype=torch.int64,
            device=device,
        )

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]):
        """Load the heads, or this tensor-parallel rank's part of them."""
        model_config = self.vllm_config.model_config
        weights = on_every_rank(
            lambda: load_heads(
                self.speculative_config.model,
                hidden_size=model_config.get_hidden_size(),
                vocab_size=model_config.get_vocab_size(),
                dtype=self.dtype,
                base_model=model_config.model,
            )
        ).first_heads(self.num_heads)
        size = self.speculative_config.draft_vocab_size
        if get_tensor_model_parallel_world_size() > 1 and not weights.spec.sequential:
            self.sharded = shard_heads(weights, target_model, size, self.device)
        if self.sharded is not None:
            heads = self.sharded.heads
        else:
            weights = cut_lm_head(weights, target_model, size)
            if size is not None and weights.lm_head is None:
                logger.info(
                    "Medusa: the heads score all ids, not the first %d: the target's lm_head is "
                    "sharded, quantised or has a bias",
                    size,
                )
            heads = self._build_heads(weights)
        if self.device.type == "cpu":
            from vllm_medusa.cpu_linear import pack_lm_head

            pack_lm_head(heads)
        # Not a submodule: vLLM walks the draft's parameters on reload and sleep.
        object.__setattr__(self, "compute_base_logits", target_model.compute_logits)
        if heads.spec.sequential:
            table = embedding_table(target_model, heads.spec.hidden_size)
            embeddings = target_model.embed_input_ids if table is None else table
            object.__setattr__(self, "embeddings", embeddings)
        return heads

    def _build_heads(self, weights: HeadWeights) -> nn.Module:
        """Whole heads on this device."""
        config, in_float8 = self.speculative_config, self.speculative_config.float8_weights
        if not weights.spec.sequential:
            make = Float8Heads if in_float8 else MedusaHeads.from_weights
            return make(weights, self.device)
        later = None
        if weights.lm_head is not None:
            later = later_size(self.device.type, config.draft_vocab_size)
        kind = Float8Weight if in_float8 else PlainWeight
        return SequentialHeads(weights, self.device, later, kind)

    def build_drafter(self) -> None:
        """Allocate what the loaded heads draft in."""
        spec = self.model.spec
        if spec.sequential:
            tree = self.tree_batch.tree
            self.drafter = SequentialDrafter(self.model, tree, self.max_num_reqs)
            if self.speculative_config.dynamic_tree:
                self.drafter = ChosenSequentialDrafter(
                    self.drafter, self.tree_batch, self.make_lookup()
                )
        elif self.speculative_config.dynamic_tree:
            self.drafter = DynamicDrafter(
                self.tree_batch, self.num_heads, spec.output_size, self.make_lookup()
            )
        elif self.sharded is not None:
            self.sharded.allocate(self.max_num_reqs, self.num_top)
        else:
            rows = self.max_num_reqs * self.num_heads
            self.workspace = DraftWorkspace.allocate(rows, spec.output_size, self.device)

    def make_lookup(self) -> PromptLookup | None:
        """What searches the requests' histories, if that was asked for."""
        length = self.speculative_config.prompt_lookup
        if length == 0:
            return None
        states, vocab_size = self.req_states, self.vllm_config.model_config.get_vocab_size()
        return PromptLookup(states.all_token_ids.gpu, states.total_len.gpu, length, vocab_size)

    def use_base_logits(self, compute_logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Score with the base's lm_head where the target's carries LoRA adapters.

        Raises
        ------
        ValueError
            With sequential heads, which would also need the base's embeddings.
        """
        if self.model.spec.sequential:
            raise ValueError(
                "Medusa does not run with LoRA adapters and sequential heads: these read "
                "embeddings to which an adapter may belong; use independent heads"
            )
        object.__setattr__(self, "compute_base_logits", compute_logits)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare graphs of the step that ends in the drafts."""
        step = self.verification_step
        self.step_graphs = None if step is None else step.make_graphs(cudagraph_mode)
        self.drawn_graphs = None if self.step_graphs is None else step.drawn_step.make_graphs()

    def capture(self) -> None:
        """Record them."""
        if self.step_graphs is not None:
            self.verification_step.capture(self.step_graphs, self.drawn_graphs)

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft tokens of every request's next tree.

        Returns
        -------
        torch.Tensor, [num_reqs, num_nodes] int64
            Node order; rows of requests still in prefill are never verified.
        """
        if self.tree_batch.drafts is not None:
            return self.tree_batch.drafts
        if kwargs.get("num_speculative_tokens") == 0:
            # A schedule that ends in 0 nodes: the next batch is plain decoding.
            return self.no_drafts[: input_batch.num_reqs]
        last_rows = self.tree_batch.last_rows
        if last_rows is None:
            token_rows = input_batch.logits_indices
        else:
            token_rows = input_batch.logits_indices[last_rows]
        slots = input_batch.idx_mapping
        if kwargs.get("dummy_run"):
            # Its rows are no requests, but their slots may be those of requests that wait.
            slots = torch.full_like(slots, -1)
        return self.draft(last_hidden_states[token_rows], slots)

    def draft(
        self,
        hidden: torch.Tensor,  # [num_reqs, hidden_size], last accepted rows
        slots: torch.Tensor,  # [num_reqs] int64, negative: no request
        out: torch.Tensor | None = None,  # [num_reqs, num_nodes] int64
    ) -> torch.Tensor:
        """Fill every request's tree from its heads' best tokens, [num_reqs, num_nodes] int64."""
        if out is None:
            out = slots.new_empty(hidden.shape[0], self.node_columns.shape[0], dtype=torch.int64)
        noise = self._noise(slots)
        if self.model.spec.sequential:
            roots = self.req_states.last_sampled_tokens.view(-1)[slots.clamp(min=0)].long()
            inputs = (hidden, roots, self.embeddings, self.compute_base_logits, noise)
            if isinstance(self.drafter, SequentialDrafter):
                self.drafter.draft(out, *inputs)
            else:
                self.drafter.draft(out, slots, *inputs)
            return out
        if self.sharded is not None:
            self.sharded.draft(out, hidden, self.node_columns)
            return out
        logits = self.model.draft_logits(hidden, self.compute_base_logits)
        token_map = self.model.token_map
        if self.drafter is not None:
            self.drafter.draft(out, logits, slots, token_map, noise)
            return out
        draft_tree(
            out,
            logits,
            self.node_columns,
            num_top=self.num_top,
            token_map=token_map,
            noise=noise,
            workspace=self.workspace,
        )
        return out

    def _noise(
        self,
        slots: torch.Tensor,  # [num_reqs] int64
    ) -> DrawNoise | None:
        """With what the sampler will draw these requests' next tokens, if drafts are to know."""
        step = self.verification_step
        if step is None or not self.speculative_config.coupled_drafts:
            return None
        lengths = self.req_states.total_len.gpu
        return DrawNoise(
            step.seeds, step.draft_temperature, lengths, slots, 1, 1, NOISE_SPREAD
        )
