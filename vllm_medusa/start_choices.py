"""What a start runs with: tree, schedule, heads and vocabulary, from options and defaults."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_medusa.config import (
    ATTENTIONS,
    DEFAULT_NODE_BUDGET,
    DEFAULT_TREE,
    DYNAMIC_TREE,
    FLOAT8_WEIGHTS,
    MAX_DYNAMIC_NODES,
    PLAIN_WEIGHTS,
    ROW_BUDGET,
    STATIC_TREE,
    MedusaOptions,
    default_schedule,
)
from vllm_medusa.cpu_budget import LEAST_PROMISE, Budget, choose_budget
from vllm_medusa.cpu_costs import machine_costs
from vllm_medusa.draft_vocabulary import default_size
from vllm_medusa.head_weights import HeadSpec
from vllm_medusa.tree import TokenTree
from vllm_medusa.tree_candidates import head_ranks

logger = init_logger(f"vllm.{__name__}")

# Ada: the first that turns float8 into floats by an instruction.
FLOAT8_CAPABILITY = 89


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
    if options.shape is not None:
        tree = TokenTree.parse(options.shape)
        tree.validate(num_heads)
    else:
        tree = TokenTree.load(tree_file) if tree_file else TokenTree.preset(DEFAULT_TREE)
        # A default must fit fewer heads too: dropping whole depths keeps a tree.
        if tree.max_depth > num_heads:
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


def choose_frequencies(
    options: MedusaOptions, tree: TokenTree, schedule: list | None
) -> tuple[float, ...]:
    """What the tree promises node by node, if the nodes of a step shall be chosen by it.

    Raises
    ------
    ValueError
        When that was asked for and cannot be.
    """
    asked = options.num_speculative_tokens_per_batch_size
    free = (options.shape, options.num_speculative_tokens, asked) == (None, None, None)
    wanted = options.adaptive
    if wanted is None:
        wanted = free and schedule is not None and not current_platform.is_cpu()
    frequencies = tree.metadata.get("frequencies")
    if not wanted or (frequencies is None and options.adaptive is None):
        return ()
    if frequencies is None:
        raise ValueError(
            "medusa: adaptive=true needs a tree.json whose nodes have frequencies; make it with "
            "`vllm-medusa calibrate`"
        )
    if schedule is None:
        raise ValueError(
            "medusa: adaptive=true chooses among the node counts of a schedule; give "
            "num_speculative_tokens_per_batch_size"
        )
    return tuple(frequencies[: tree.num_nodes])


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


def choose_draft_weights(
    options: MedusaOptions, spec: HeadSpec, dtype: torch.dtype, parallel_config: Any
) -> bool:
    """Whether heads draft with float8 weights: by default wherever they can.

    Raises
    ------
    ValueError
        They cannot, but that was asked for.
    """
    if options.draft_weights == PLAIN_WEIGHTS:
        return False
    reason = _why_unquantised(spec, dtype, parallel_config)
    if reason is not None and options.draft_weights == FLOAT8_WEIGHTS:
        raise ValueError(
            f"medusa: draft_weights={FLOAT8_WEIGHTS!r}: {reason}; leave draft_weights out"
        )
    return reason is None


def _why_unquantised(spec: HeadSpec, dtype: torch.dtype, parallel_config: Any) -> str | None:
    """Why heads keep the target's dtype; None where float8 serves."""
    if not (
        current_platform.is_cuda() and current_platform.has_device_capability(FLOAT8_CAPABILITY)
    ):
        return (
            "its kernel needs an NVIDIA GPU that converts float8, of compute capability "
            f"{FLOAT8_CAPABILITY / 10} or later"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it replaces weights of 16 bits, the target's are {dtype}"
    ranks = parallel_config.tensor_parallel_size
    if ranks > 1 and not spec.sequential:
        return f"with tensor_parallel_size={ranks} each rank holds a part of the heads as it is"
    return None


def choose_coupling(
    options: MedusaOptions, spec: HeadSpec, model_config: Any, parallel_config: Any
) -> bool:
    """Whether drafts of sampled requests use the sampler's noise: by default on GPUs.

    On a CPU the noise costs more time than the few nodes of its trees gain: for four heads of
    12,288 ids 1 ms of a step's 14 or so, where 2 to 5 % more tokens are to be had.

    Raises
    ------
    ValueError
        They cannot, but that was asked for.
    """
    if options.coupled_drafts is False:
        return False
    reason, ranks = None, parallel_config.tensor_parallel_size
    if model_config.use_fp64_gumbel:
        reason = "drafts know the sampler's float32 noise, and use_fp64_gumbel draws another"
    elif ranks > 1 and not spec.sequential:
        reason = (
            f"with tensor_parallel_size={ranks} independent heads compare logits across ranks, "
            "without noise"
        )
    if reason is not None and options.coupled_drafts:
        raise ValueError(f"medusa: coupled_drafts=true: {reason}; leave coupled_drafts out")
    return reason is None and (options.coupled_drafts or not current_platform.is_cpu())


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


def cut_to_machine(tree: TokenTree, budget: Budget, dtype: torch.dtype) -> TokenTree | None:
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


def usable_heads(options: MedusaOptions, spec: HeadSpec, parallel_config: Any) -> int:
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


def check_attention(options: MedusaOptions) -> None:
    """Refuse xformers' tree attention where it cannot run."""
    if options.attention == ATTENTIONS[0]:
        return
    if not current_platform.is_cuda():
        reason = "its kernels need an NVIDIA GPU"
    elif find_spec("xformers") is None:
        reason = "it is not installed; pip install vllm-medusa[xformers]"
    else:
        return
    raise ValueError(f"medusa: attention={options.attention!r}: {reason}; or leave attention out")


def resolve_tree(
    options: MedusaOptions, num_nodes: int, spec: HeadSpec, num_heads: int, parallel_config: Any
) -> MedusaOptions:
    """Options whose tree says whether trees are chosen: at every step wherever that can be.

    Parameters
    ----------
    options : MedusaOptions
    num_nodes : int
        Of the static tree, cut to the budget.
    spec : HeadSpec
    num_heads : int
        Heads available to the tree.
    parallel_config : vllm.config.ParallelConfig

    Raises
    ------
    ValueError
        Trees cannot be chosen at every step, but that or prompt lookup was asked for.
    """
    if options.shape is not None or options.tree == STATIC_TREE:
        return options
    reason = _why_static(options, num_nodes, spec, num_heads, parallel_config)
    if reason is None:
        return dataclasses.replace(options, tree=DYNAMIC_TREE)
    if options.tree == DYNAMIC_TREE:
        raise ValueError(f"medusa: tree={DYNAMIC_TREE!r}: {reason}")
    if options.prompt_lookup:
        raise ValueError(
            f"medusa: prompt_lookup={options.prompt_lookup} needs trees that are chosen at every "
            f"step, but {reason}"
        )
    logger.info("Medusa: one tree for all steps: %s", reason)
    return dataclasses.replace(options, tree=STATIC_TREE)


def _why_static(
    options: MedusaOptions, num_nodes: int, spec: HeadSpec, num_heads: int, parallel_config: Any
) -> str | None:
    """Why trees cannot be chosen at every step; None if they can."""
    stages = parallel_config.pipeline_parallel_size
    ranks = parallel_config.tensor_parallel_size
    if stages > 1 or ranks > 1:
        return (
            f"every rank needs the tree that one of them chooses, found tensor_parallel_size="
            f"{ranks} and pipeline_parallel_size={stages}; leave tree out"
        )
    if num_nodes > MAX_DYNAMIC_NODES:
        return (
            f"num_speculative_tokens={num_nodes} is more than the {MAX_DYNAMIC_NODES} nodes "
            "that a tree chosen at every step may have; lower it or leave tree out"
        )
    if options.attention != ATTENTIONS[0]:
        return f"attention={options.attention!r} knows one tree for a whole batch"
    if not spec.sequential:
        try:
            head_ranks(num_nodes, num_heads, spec.output_size)
        except ValueError as error:
            return str(error).partition(": ")[2]
    return None
