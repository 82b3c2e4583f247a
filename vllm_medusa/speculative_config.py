"""vLLM's ``SpeculativeConfig`` for ``method="medusa"`` on the V2 model runner."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.config import (
    ACCEPTANCE_RULES,
    ATTENTIONS,
    MEDUSA_METHOD,
    TYPICAL_EPSILON,
    MedusaOptions,
    check_acceptance,
)
from vllm_medusa.head_weights import HeadWeights
from vllm_medusa.start_choices import (
    budget_for_machine,
    check_attention,
    choose_coupling,
    choose_draft_vocabulary,
    choose_draft_weights,
    choose_frequencies,
    choose_schedule,
    choose_tree,
    cut_to_machine,
    resolve_tree,
    usable_heads,
)
from vllm_medusa.tree import TokenTree

logger = init_logger(f"vllm.{__name__}")


@config
class MedusaSpeculativeConfig(SpeculativeConfig):
    """A tree of drafts: ``num_speculative_tokens`` counts nodes, root excluded.

    vLLM 0.32 reserves ``"medusa"`` for its deprecated chain proposer and would
    open ``model`` as a draft model.  The base class is therefore initialised as
    ``"ngram_gpu"``, its only method without a draft checkpoint, draft KV cache or
    lookahead slots, and shows ``"medusa"`` from then on.
    """

    tree_paths: tuple[tuple[int, ...], ...] = ()
    """Rank path of every node, parents first, cut to the budget."""
    attention: str = ATTENTIONS[0]
    """Whose tree attention runs on a GPU."""
    dynamic_tree: bool = False
    """Whether requests choose a tree at every step; ``tree_paths`` is for those that cannot."""
    prompt_lookup: int = 0
    """Tokens of its history that a request proposes for the tree that it chooses; 0: none."""
    num_medusa_heads: int = 0
    """Heads that a tree can reach (the depth of a static one), never more than the file holds."""
    acceptance: str = ACCEPTANCE_RULES[0]
    """Rule of requests that name none."""
    typical_epsilon: float = TYPICAL_EPSILON
    """Parameters of typical acceptance for requests that bring none of their own."""
    typical_delta: float = math.sqrt(TYPICAL_EPSILON)
    draft_vocab_size: int | None = None
    """First ids that heads with a shared lm_head score; None: all."""
    float8_weights: bool = False
    """Whether heads that are whole on their device draft with weights rounded to float8."""
    coupled_drafts: bool = False
    """Whether requests with a temperature draft what the sampler's noise favours."""
    node_frequencies: tuple[float, ...] = ()
    """Share of steps whose path held each node in calibration, where the nodes of a step are chosen
    as it comes; empty: they follow the schedule."""
    packed_layers: str = ""
    """Which of the target's layers multiply by the row product, and over what; set by the worker
    once they are loaded."""

    def __post_init__(self):
        self.method = "ngram_gpu"
        super().__post_init__()
        self.method = MEDUSA_METHOD
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        return self

    def compute_hash(self) -> str:
        """Also tell apart targets whose layers call different products.

        vLLM keeps compiled graphs under this hash; one that another compiler's absence, or
        another checkpoint of the same shape, left behind would call products that are not there.
        """
        return f"{super().compute_hash()}{self.packed_layers}"

    @property
    def token_tree(self) -> TokenTree:
        """The tree as an object (rebuilt on access; configs travel between processes)."""
        return TokenTree.from_paths(self.tree_paths)

    @property
    def deepest_path(self) -> int:
        """Most tokens of a path that a tree can hold, the root's not counted."""
        return min(len(self.tree_paths), max(self.num_medusa_heads, self.prompt_lookup))

    def row_counts(self, max_num_seqs: int) -> tuple[int, ...]:
        """Rows (root + nodes) that a decode query can have at any batch size, ascending."""
        if self.num_speculative_tokens_per_batch_size is None:
            return (1 + self.num_speculative_tokens,)
        nodes = build_dynamic_sd_schedule_lookup(
            self.num_speculative_tokens_per_batch_size, max_num_seqs, self.num_speculative_tokens
        )
        return tuple(sorted({1 + n for n in nodes[1:]}))

    def costs_file(self, instance_id: str) -> Path:
        """Where an engine's first worker leaves what steps cost, for its scheduler."""
        return Path(envs.VLLM_CACHE_ROOT) / "vllm_medusa" / f"steps-{instance_id}.json"

    def __repr__(self) -> str:
        method, model = self.method, self.model
        nodes, heads = self.num_speculative_tokens, self.num_medusa_heads
        kind = ", tree='dynamic'" if self.dynamic_tree else ""
        return f"SpeculativeConfig({method=}, {model=}, tree_nodes={nodes}, heads={heads}{kind})"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch from starting its thread pool in the user's process.

    ``LLM`` forks the engine core from there by default, and a pool of OpenMP threads
    does not survive a fork: the first parallel operation of the child never ended.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def create_medusa_config(
    speculative_config: dict[str, Any], target_model_config: Any, target_parallel_config: Any
) -> MedusaSpeculativeConfig | None:
    """Build the config from a user's dictionary and the target's configs.

    Returns
    -------
    MedusaSpeculativeConfig or None
        None where no tree would pay: on a CPU whose products cost each row anew.

    Raises
    ------
    ValueError
        Unknown keys, heads that do not fit the target, impossible tree.
    """
    options = MedusaOptions.from_speculative_config(speculative_config)
    check_attention(options)
    heads = _read_heads(options, target_model_config)
    num_heads = usable_heads(options, heads.spec, target_parallel_config)
    tree = choose_tree(options, num_heads, heads.tree_path)
    options = resolve_tree(
        options, tree.num_nodes, heads.spec, num_heads, target_parallel_config
    )
    schedule = choose_schedule(options, tree)
    free = (options.shape, options.num_speculative_tokens, schedule) == (None, None, None)
    if free and heads.tree_path is not None and current_platform.is_cpu():
        whole = TokenTree.load(heads.tree_path)
        budget = budget_for_machine(whole, num_heads, target_model_config)
        if budget is not None:
            tree = cut_to_machine(whole, budget, target_model_config.dtype)
            if tree is None:
                return None
            schedule = budget.schedule
    used_heads = tree.max_depth
    # The nodes of sequential heads come from the tree, however they are chosen.
    if options.dynamic_tree and not heads.spec.sequential:
        used_heads = min(num_heads, tree.num_nodes)
    float8_weights = choose_draft_weights(
        options, heads.spec, target_model_config.dtype, target_parallel_config
    )
    logger.info(
        "Medusa: %d heads from %s (format %s%s), %s of %d nodes and depth %d",
        num_heads,
        options.model,
        heads.format,
        ", rounded to float8" if float8_weights else "",
        "trees chosen at every step" if options.dynamic_tree else "tree",
        tree.num_nodes,
        used_heads,
    )
    epsilon, delta = check_acceptance(
        options.acceptance, options.typical_epsilon, options.typical_delta
    )
    return MedusaSpeculativeConfig(
        method=MEDUSA_METHOD,
        model=options.location,
        num_speculative_tokens=tree.num_nodes,
        tree_paths=tree.paths,
        num_speculative_tokens_per_batch_size=schedule,
        attention=options.attention,
        dynamic_tree=options.dynamic_tree,
        prompt_lookup=options.lookup_length,
        num_medusa_heads=used_heads,
        acceptance=options.acceptance,
        typical_epsilon=epsilon,
        typical_delta=delta,
        draft_vocab_size=choose_draft_vocabulary(options, heads.spec),
        float8_weights=float8_weights,
        coupled_drafts=choose_coupling(
            options, heads.spec, target_model_config, target_parallel_config
        ),
        node_frequencies=choose_frequencies(options, tree, schedule),
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
    )


def _read_heads(options: MedusaOptions, target_model_config: Any) -> HeadWeights:
    """The whole file, in the user's own process.

    A bad one is refused before engine and workers start; they read it again from the page cache.
    """
    with one_thread():
        return load_heads(
            options.location,
            hidden_size=target_model_config.get_hidden_size(),
            vocab_size=target_model_config.get_vocab_size(),
            base_model=target_model_config.model,
        )


def is_medusa(speculative_config: Any) -> bool:
    """Whether a vLLM config asks for this plugin."""
    return isinstance(speculative_config, MedusaSpeculativeConfig)
