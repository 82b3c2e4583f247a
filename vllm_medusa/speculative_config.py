"""vLLM's ``SpeculativeConfig`` for ``method="medusa"`` on the V2 model runner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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
    DEFAULT_NODE_BUDGET,
    DEFAULT_TREE,
    MEDUSA_METHOD,
    ROW_BUDGET,
    MedusaOptions,
    default_schedule,
)
from vllm_medusa.draft_vocabulary import default_size
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
    num_medusa_heads: int = 0
    """Heads that the tree reaches (its depth), never more than the file holds."""
    draft_vocab_size: int | None = None
    """First ids that heads with a shared lm_head score; None: all."""

    def __post_init__(self):
        self.method = "ngram_gpu"
        super().__post_init__()
        self.method = MEDUSA_METHOD
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        return self

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
        return f"SpeculativeConfig({method=}, {model=}, tree_nodes={nodes}, heads={heads})"


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
    if options.tree is not None:
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


def tree_for_cpu(default: TokenTree, tree_file: Path | None, model: Any) -> TokenTree | None:
    return default


def create_medusa_config(
    speculative_config: dict[str, Any], target_model_config: Any, target_parallel_config: Any
) -> MedusaSpeculativeConfig:
    """Build the config from a user's dictionary and the target's configs.

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
    num_heads = heads.spec.num_heads
    if heads.spec.sequential and target_parallel_config.pipeline_parallel_size > 1:
        stages = target_parallel_config.pipeline_parallel_size
        raise ValueError(
            f"medusa: {options.model} holds sequential heads, which read the input embeddings; "
            f"with pipeline_parallel_size={stages} those are on another stage; use independent "
            "heads or one stage"
        )
    if options.num_heads is not None:
        if options.num_heads > num_heads:
            raise ValueError(
                f"medusa: num_heads={options.num_heads} but {options.model} holds {num_heads}"
            )
        num_heads = options.num_heads
    tree = choose_tree(options, num_heads, heads.tree_path)
    if current_platform.is_cpu() and options.tree is options.num_speculative_tokens is None:
        tree = tree_for_cpu(tree, heads.tree_path, target_model_config)
        if tree is None:
            return None
    logger.info(
        "Medusa: %d heads from %s (format %s), tree of %d nodes and depth %d",
        num_heads,
        options.model,
        heads.format,
        tree.num_nodes,
        tree.max_depth,
    )
    return MedusaSpeculativeConfig(
        method=MEDUSA_METHOD,
        model=options.location,
        num_speculative_tokens=tree.num_nodes,
        tree_paths=tree.paths,
        num_speculative_tokens_per_batch_size=choose_schedule(options, tree),
        num_medusa_heads=tree.max_depth,
        draft_vocab_size=options.draft_vocab_size
        or default_size(current_platform.device_type, target_model_config.get_vocab_size()),
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
    )


def is_medusa(speculative_config: Any) -> bool:
    """Whether a vLLM config asks for this plugin."""
    return isinstance(speculative_config, MedusaSpeculativeConfig)
