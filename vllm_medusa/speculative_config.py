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
from vllm.v1.spec_decode.dynamic.utils import (
    build_dynamic_sd_schedule_lookup,
    validate_and_normalize_dynamic_sd_schedule,
)

from vllm_medusa.checkpoint import load_heads
from vllm_medusa.config import (
    ACCEPTANCE_RULES,
    DEFAULT_NODE_BUDGET,
    DEFAULT_TREE,
    DYNAMIC_TREE,
    MAX_DYNAMIC_NODES,
    MEDUSA_METHOD,
    ROW_BUDGET,
    TYPICAL_EPSILON,
    MedusaOptions,
    check_acceptance,
    default_schedule,
)
from vllm_medusa.cpu_budget import LEAST_PROMISE, Budget, choose_budget
from vllm_medusa.cpu_costs import machine_costs
from vllm_medusa.draft_vocabulary import default_size
from vllm_medusa.head_weights import HeadSpec
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
    dynamic_tree: bool = False
    """Whether requests choose a tree at every step; ``tree_paths`` is for those that cannot."""
    num_medusa_heads: int = 0
    """Heads that a tree can reach (the depth of a static one), never more than the file holds."""
    acceptance: str = ACCEPTANCE_RULES[0]
    """Rule of requests that name none."""
    typical_epsilon: float = TYPICAL_EPSILON
    """Parameters of typical acceptance for requests that bring none of their own."""
    typical_delta: float = math.sqrt(TYPICAL_EPSILON)
    draft_vocab_size: int | None = None
    """First ids that heads with a shared lm_head score; None: all."""
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

    def row_counts(self, max_num_seqs: int) -> tuple[int, ...]:
        """Rows (root + nodes) that a decode query can have at any batch size, ascending."""
        if self.num_speculative_tokens_per_batch_size is None:
            return (1 + self.num_speculative_tokens,)
        nodes = build_dynamic_sd_schedule_lookup(
            self.num_speculative_tokens_per_batch_size, max_num_seqs, self.num_speculative_tokens
        )
        return tuple(sorted({1 + n for n in nodes[1:]}))

    def __repr__(self) -> str:
        method, model = self.method, self.model
        nodes, heads = self.num_speculative_tokens, self.num_medusa_heads
        kind = ", tree='dynamic'" if self.dynamic_tree else ""
        return f"SpeculativeConfig({method=}, {model=}, tree_nodes={nodes}, heads={heads}{kind})"


def choose_tree(options: MedusaOptions, num_heads: int, tree_file: Path | None) -> TokenTree:
    """Tree for this start: asked for, else beside the heads, else the built-in one.

    Parameters
    ----------
    options : MedusaOptions
    num_heads : int
        Heads available to the tree.
    tree_file : pathlib.Path or None
        ``tree.json`` beside the heads.

    Returns
    -------
    TokenTree
        Cut to the node budget of the options or of the device.

    Raises
    ------
    ValueError
        When an explicit tree is deeper than the heads, or is no tree.
    """
    if options.tree is not None and not options.dynamic_tree:
        tree = TokenTree.parse(options.tree)
        tree.validate(num_heads)
    else:
        tree = TokenTree.load(tree_file) if tree_file else TokenTree.preset(DEFAULT_TREE)
        # A default must fit fewer heads too: dropping whole depths keeps a tree.
        tree = TokenTree.from_paths([path for path in tree.paths if len(path) <= num_heads])
    budget = options.num_speculative_tokens
    if budget is None:
        budget = DEFAULT_NODE_BUDGET.get(current_platform.device_type, DEFAULT_NODE_BUDGET["cuda"])
    return tree.cut(min(budget, tree.num_nodes))


def choose_schedule(options: MedusaOptions, tree: TokenTree) -> list[tuple[int, int, int]] | None:
    """Nodes per batch size: asked for, else what the device's row budget allows.

    Raises
    ------
    ValueError
        When vLLM cannot read the schedule asked for.
    """
    asked = options.num_speculative_tokens_per_batch_size
    if asked is not None:
        try:
            return validate_and_normalize_dynamic_sd_schedule(asked)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"medusa: num_speculative_tokens_per_batch_size={asked!r}: {error}"
            ) from None
    budget = ROW_BUDGET.get(current_platform.device_type, ROW_BUDGET["cuda"])
    return default_schedule(tree.num_nodes, budget)


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


def choose_draft_vocabulary(options: MedusaOptions, spec: HeadSpec) -> int | None:
    """Ids that heads with the target's lm_head score: asked for, else what the device wants.

    Raises
    ------
    ValueError
        When the heads bring the choice with them, or the target has fewer ids.
    """
    asked = options.draft_vocab_size
    if spec.own_lm_head or spec.vocab_subset_size is not None:
        if asked:
            raise ValueError(
                f"medusa: draft_vocab_size={asked}, but {options.model} brings an lm_head or a "
                "vocabulary subset of its own; leave it out"
            )
        return None
    if asked is not None and asked > spec.vocab_size:
        raise ValueError(
            f"medusa: draft_vocab_size={asked} but the target has {spec.vocab_size} ids"
        )
    if asked is None:
        return default_size(current_platform.device_type, spec.vocab_size)
    return asked or None


def budget_for_machine(tree: TokenTree, num_heads: int, model: Any) -> Budget | None:
    """Nodes that pay on this CPU, by batch size; None where the tree or the machine tells nothing.

    Parameters
    ----------
    tree : TokenTree
        A calibrated one knows how often a path holds each of its nodes.
    num_heads : int
        Heads available to the tree.
    model : vllm.config.ModelConfig
        The target's.
    """
    if not tree.metadata.get("frequencies") or tree.max_depth > num_heads:
        return None
    stored = getattr(model.hf_config, "dtype", None)
    costs = machine_costs(
        Path(envs.VLLM_CACHE_ROOT) / "vllm_medusa",
        model.get_hidden_size(),
        model.dtype,
        stored if isinstance(stored, torch.dtype) else model.dtype,
    )
    if costs is None:
        logger.info("Medusa: could not measure this CPU's products (busy?), default budget taken")
        return None
    return choose_budget(tree.metadata["frequencies"], costs)


def _cut_to_machine(tree: TokenTree, budget: Budget, dtype: torch.dtype) -> TokenTree | None:
    """The calibrated tree with the budget's nodes; None, with a warning, where it would lose."""
    if budget.speedup >= LEAST_PROMISE:
        logger.info(
            "Medusa: %d nodes promise %.2f times the speed on this CPU",
            budget.nodes,
            budget.speedup,
        )
        return tree.cut(budget.nodes)
    logger.warning(
        "Medusa: on this CPU several rows of %s cost so much more than one that the best tree "
        "promises %.2f times the speed, so Medusa stays off; num_speculative_tokens turns it on "
        "(float32 may be the faster dtype here)",
        dtype,
        budget.speedup,
    )
    return None


def _usable_heads(options: MedusaOptions, spec: HeadSpec, parallel_config: Any) -> int:
    """Heads that a tree may use: asked for, or all that the file holds."""
    stages = parallel_config.pipeline_parallel_size
    if spec.sequential and stages > 1:
        raise ValueError(
            f"medusa: {options.model} holds sequential heads, which read the input embeddings; "
            f"with pipeline_parallel_size={stages} those are on another stage; use independent "
            "heads or one stage"
        )
    if options.num_heads is None:
        return spec.num_heads
    if options.num_heads > spec.num_heads:
        raise ValueError(
            f"medusa: num_heads={options.num_heads} but {options.model} holds {spec.num_heads}"
        )
    return options.num_heads


def _check_dynamic(
    options: MedusaOptions, tree: TokenTree, spec: HeadSpec, parallel_config: Any
) -> None:
    """Refuse what trees chosen at every step cannot be combined with."""
    stages = parallel_config.pipeline_parallel_size
    ranks = parallel_config.tensor_parallel_size
    reason = None
    if spec.sequential:
        reason = (
            f"{options.model} holds sequential heads, whose probabilities depend on the path; "
            "leave tree out or use independent heads"
        )
    elif stages > 1 or ranks > 1:
        reason = (
            f"every rank needs the tree that one of them chooses, found tensor_parallel_size="
            f"{ranks} and pipeline_parallel_size={stages}; leave tree out"
        )
    elif tree.num_nodes > MAX_DYNAMIC_NODES:
        reason = (
            f"num_speculative_tokens={tree.num_nodes} is more than the {MAX_DYNAMIC_NODES} nodes "
            "that a tree chosen at every step may have; lower it or leave tree out"
        )
    if reason is not None:
        raise ValueError(f"medusa: tree={DYNAMIC_TREE!r}: {reason}")


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
    # The whole file is read here, in the user's own process, so that a bad one is
    # refused before engine and workers start; they read it again from the page cache.
    with one_thread():
        heads = load_heads(
            options.location,
            hidden_size=target_model_config.get_hidden_size(),
            vocab_size=target_model_config.get_vocab_size(),
            base_model=target_model_config.model,
        )
    num_heads = _usable_heads(options, heads.spec, target_parallel_config)
    tree = choose_tree(options, num_heads, heads.tree_path)
    schedule = choose_schedule(options, tree)
    shape = None if options.dynamic_tree else options.tree
    free = (shape, options.num_speculative_tokens, schedule) == (None, None, None)
    if free and heads.tree_path is not None and current_platform.is_cpu():
        whole = TokenTree.load(heads.tree_path)
        budget = budget_for_machine(whole, num_heads, target_model_config)
        if budget is not None:
            tree = _cut_to_machine(whole, budget, target_model_config.dtype)
            if tree is None:
                return None
            schedule = budget.schedule
    used_heads = tree.max_depth
    if options.dynamic_tree:
        _check_dynamic(options, tree, heads.spec, target_parallel_config)
        used_heads = min(num_heads, tree.num_nodes)
    logger.info(
        "Medusa: %d heads from %s (format %s), %s of %d nodes and depth %d",
        num_heads,
        options.model,
        heads.format,
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
        dynamic_tree=options.dynamic_tree,
        num_medusa_heads=used_heads,
        acceptance=options.acceptance,
        typical_epsilon=epsilon,
        typical_delta=delta,
        draft_vocab_size=choose_draft_vocabulary(options, heads.spec),
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
    )


def is_medusa(speculative_config: Any) -> bool:
    """Whether a vLLM config asks for this plugin."""
    return isinstance(speculative_config, MedusaSpeculativeConfig)
