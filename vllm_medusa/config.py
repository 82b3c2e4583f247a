"""What a user may ask of Medusa, validated once, with every default in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MEDUSA_METHOD = "medusa"
MEDUSA_PREFIX = "medusa:"

# One or two 64-bit words hold a row's ancestors, so a tree is the root and at most 127 nodes.
MAX_TREE_NODES = 127

# An NVIDIA GPU verifies 64 rows of one request at almost the price of one. On a CPU a
# calibrated tree is cut to what pays there (cpu_budget.py); this is for the others. The row
# product takes 6 rows at once: on two Zen 3 cores 1 / 6 / 7 rows cost 9 / 10 / 17 ms.
DEFAULT_NODE_BUDGET = {"cuda": 63, "cpu": 5}

# Rows that a step can verify beside reading the weights once: past about 256 an H100's
# bf16 products cost more than the weights' way through memory (8B shape). Batches share
# them, so the tree of a request is cut as the batch grows. None: no cut.
ROW_BUDGET = {"cuda": 256, "cpu": None}

# Exact: the output's distribution is the model's own.  Typical: the paper's section 2.3.1,
# with its defaults (delta is the square root of epsilon).
ACCEPTANCE_RULES = ("exact", "typical")
TYPICAL_EPSILON = 0.09

# In place of a tree: each request's likeliest nodes, chosen anew at every step, or the one tree
# that lies beside the heads.
DYNAMIC_TREE, STATIC_TREE = "dynamic", "static"
# What one 64-bit word a row holds; the kernel that chooses trees writes one.
MAX_DYNAMIC_NODES = 63

# Tokens of a request's history that compete for nodes there. An estimate on the answers that its
# prices come from (MT-Bench, SmolLM2-135M, which repeats itself a lot): 63 nodes make 2.26 / 3.29 /
# 3.53 / 3.69 tokens a step with 0 / 6 / 10 / 16.
DEFAULT_LOOKUP = 16

# Who attends to verification rows on a GPU; the first is this project's kernel.
ATTENTIONS = ("triton", "xformers")

# How heads hold what they draft with; the first is float8 wherever that can be.
DRAFT_WEIGHTS = AUTO_WEIGHTS, FLOAT8_WEIGHTS, PLAIN_WEIGHTS = "auto", "float8", "unquantised"

# Used when the checkpoint directory brings no tree.json of its own.
DEFAULT_TREE = "mc_sim_7b_63"


@dataclass(frozen=True)
class MedusaOptions:
    """Options of ``speculative_config`` for ``method="medusa"``.

    Attributes
    ----------
    model : str
        Heads: a directory, a ``.safetensors`` file, a ``.pt`` file or a hub id.
    num_speculative_tokens : int or None
        Node budget: at most this many nodes (root not counted) are verified per
        step.  None takes :data:`DEFAULT_NODE_BUDGET` for the device.
    num_speculative_tokens_per_batch_size : list or None
        vLLM's own key: ``(first, last, nodes)`` per range of batch sizes.  None takes
        :func:`default_schedule` for the device.
    tree : str or list or None
        Preset name, path of a tree file, list of widths or list of paths.
        :data:`STATIC_TREE` takes ``tree.json`` beside the heads, else :data:`DEFAULT_TREE`.
        :data:`DYNAMIC_TREE` chooses a tree for every request and step; requests whose rows the
        host lays out keep the static one. None is dynamic where that can be, see
        :func:`vllm_medusa.start_choices.resolve_tree`, else static.
    num_heads : int or None
        Use only the first heads; None uses all in the file.
    revision : str or None
        Hub revision of ``model``.
    acceptance : str
        Rule of requests that name none: ``exact`` or ``typical``.
    typical_epsilon : float
        Probability that always suffices under typical acceptance.
    typical_delta : float or None
        Factor of ``exp(-entropy)`` there; None takes the square root of epsilon.
    draft_vocab_size : int or None
        Heads that share the target's lm_head score its first ids only; 0 means all, None
        takes a quarter of large vocabularies.
    draft_weights : str
        How layers and lm_heads of the heads are held, one of :data:`DRAFT_WEIGHTS`; the target's
        own lm_head, where heads share all of it, stays as it is.
    adaptive : bool or None
        Choose the nodes of each step by what steps cost here and what is accepted lately;
        None does so on a GPU unless nodes, tree or schedule were asked for.
    coupled_drafts : bool or None
        Draft for requests with a temperature what the sampler's own noise favours; None does so
        wherever that can be and pays, see :func:`vllm_medusa.start_choices.choose_coupling`.
    attention : str
        Whose tree attention runs on a GPU, one of :data:`ATTENTIONS`.
    prompt_lookup : int or None
        Tokens of what followed a request's newest tokens earlier, which compete with the heads'
        for the nodes of a tree chosen step by step; 0 leaves it to the heads. None takes
        :data:`DEFAULT_LOOKUP` where trees are chosen, else 0.
    """

    model: str
    num_speculative_tokens: int | None = None
    num_speculative_tokens_per_batch_size: list | None = None
    tree: str | list | None = None
    num_heads: int | None = None
    revision: str | None = None
    acceptance: str = ACCEPTANCE_RULES[0]
    typical_epsilon: float = TYPICAL_EPSILON
    typical_delta: float | None = None
    draft_vocab_size: int | None = None
    draft_weights: str = AUTO_WEIGHTS
    adaptive: bool | None = None
    coupled_drafts: bool | None = None
    attention: str = ATTENTIONS[0]
    prompt_lookup: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(
                f"medusa: model={self.model!r} is not a path; give the directory, .safetensors "
                "file or hub id of the Medusa heads"
            )
        if self.num_speculative_tokens is not None and not (
            isinstance(self.num_speculative_tokens, int)
            and 1 <= self.num_speculative_tokens <= MAX_TREE_NODES
        ):
            raise ValueError(
                f"medusa: num_speculative_tokens={self.num_speculative_tokens!r} is the node "
                f"budget of the tree and must be an integer from 1 to {MAX_TREE_NODES}"
            )
        if self.num_heads is not None and not (
            isinstance(self.num_heads, int) and self.num_heads >= 1
        ):
            raise ValueError(f"medusa: num_heads={self.num_heads!r} must be a positive integer")
        for name in ("adaptive", "coupled_drafts"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"medusa: {name}={value!r} must be true or false")
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"medusa: attention={self.attention!r} must be one of {', '.join(ATTENTIONS)}"
            )
        if self.draft_weights not in DRAFT_WEIGHTS:
            raise ValueError(
                f"medusa: draft_weights={self.draft_weights!r} must be one of "
                f"{', '.join(DRAFT_WEIGHTS)}"
            )
        check_lookup(self.prompt_lookup, self.tree in (None, DYNAMIC_TREE))
        check_acceptance(self.acceptance, self.typical_epsilon, self.typical_delta, "medusa: ")
        if self.draft_vocab_size is not None and not (
            isinstance(self.draft_vocab_size, int)
            and (self.draft_vocab_size == 0 or self.draft_vocab_size >= MAX_TREE_NODES)
        ):
            raise ValueError(
                f"medusa: draft_vocab_size={self.draft_vocab_size!r} is how many ids the heads "
                f"score and must be 0 (all) or an integer of at least {MAX_TREE_NODES}"
            )

    @property
    def dynamic_tree(self) -> bool:
        """Whether trees are chosen step by step, once the default is resolved."""
        return self.tree == DYNAMIC_TREE

    @property
    def shape(self) -> str | list | None:
        """The tree that was asked for; None where ``tree.json`` knows it."""
        return None if self.tree in (DYNAMIC_TREE, STATIC_TREE) else self.tree

    @property
    def lookup_length(self) -> int:
        """Tokens that a request's history proposes."""
        if self.prompt_lookup is None:
            return DEFAULT_LOOKUP if self.dynamic_tree else 0
        return self.prompt_lookup

    @property
    def location(self) -> str:
        """What ``load_heads`` takes: the path, or the hub id with its revision."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    @classmethod
    def from_speculative_config(cls, config: Mapping[str, Any]) -> MedusaOptions:
        """Read vLLM's ``speculative_config`` dictionary (``-`` and ``_`` are alike).

        Raises
        ------
        ValueError
            On a key that Medusa does not understand, naming it and the known ones.
        """
        given = {key.replace("-", "_"): value for key, value in config.items()}
        method = given.pop("method", MEDUSA_METHOD)
        if method != MEDUSA_METHOD:
            raise ValueError(f"method={method!r} is not {MEDUSA_METHOD!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(
                f"medusa: speculative_config key {unknown[0]!r} has no meaning for Medusa; "
                f"known keys: method, {', '.join(sorted(known))}"
            )
        if given.get("model") is None:
            raise ValueError(
                'medusa: speculative_config names no heads; add "model": '
                '"<directory, .safetensors file or hub id>"'
            )
        return cls(**given)


def check_lookup(length: Any, may_choose: bool) -> None:
    """Refuse a length of prompt lookup that is none, or that no tree would use."""
    if length is None:
        return
    # bool is an int to Python.
    is_number = isinstance(length, int) and not isinstance(length, bool)
    if not (is_number and 0 <= length <= MAX_DYNAMIC_NODES):
        raise ValueError(
            f"medusa: prompt_lookup={length!r} is how many tokens of its history a request may "
            f"propose and must be an integer from 0 (none) to {MAX_DYNAMIC_NODES}"
        )
    if length and not may_choose:
        raise ValueError(
            f"medusa: prompt_lookup={length} needs trees that are chosen step by step; add "
            f'"tree": "{DYNAMIC_TREE}" or leave prompt_lookup out'
        )


def check_acceptance(
    acceptance: Any, epsilon: Any, delta: Any, prefix: str = ""
) -> tuple[float, float]:
    """Epsilon and delta of an acceptance rule; a delta of None is the square root of epsilon.

    Raises
    ------
    ValueError
        On an unknown rule or an impossible value; ``prefix`` stands before its name.
    """
    if acceptance not in ACCEPTANCE_RULES:
        raise ValueError(
            f"{prefix}acceptance={acceptance!r} must be one of {', '.join(ACCEPTANCE_RULES)}"
        )

    def number(name: str, value: Any, highest: float) -> float:
        # bool is an int to Python; NaN fails the comparison.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            value_ok = False
        else:
            value_ok = 0 < value <= highest
        if not value_ok:
            raise ValueError(
                f"{prefix}{name}={value!r} must be a number above 0 and at most {highest:g}"
            )
        return float(value)

    epsilon = number("typical_epsilon", epsilon, 1.0)
    if delta is None:
        return epsilon, math.sqrt(epsilon)
    return epsilon, number("typical_delta", delta, 1e6)


def default_schedule(num_nodes: int, row_budget: int | None) -> list[tuple[int, int, int]] | None:
    """Nodes per request for ranges of batch sizes, in the form of vLLM's dynamic speculation.

    Parameters
    ----------
    num_nodes : int
        Nodes of the whole tree.
    row_budget : int or None
        Rows (root + nodes) that all requests of a step share; None means no limit.

    Returns
    -------
    list of (first, last, nodes), or None
        None when every batch verifies the whole tree. Batches for which not even one node each
        is left get 0, plain decoding.

    Examples
    --------
    >>> schedule = default_schedule(63, 256)
    >>> schedule[:3], schedule[-2:]
    ([(1, 4, 63), (5, 8, 31), (9, 16, 15)], [(65, 128, 1), (129, 256, 0)])
    """
    if row_budget is None:
        return None
    schedule, first, nodes = [], 1, num_nodes
    while nodes >= 1:
        last = max(first, row_budget // (nodes + 1))
        schedule.append((first, last, nodes))
        # Few distinct widths: each is captured as graphs of its own.
        first, nodes = last + 1, max(nodes > 1, (nodes + 1) // 2 - 1)
    return [*schedule, (first, max(first, row_budget), 0)]


def with_plain_steps(
    schedule: list[tuple[int, int, int]], max_num_seqs: int
) -> list[tuple[int, int, int]]:
    """The schedule with 0 nodes somewhere, since vLLM records graphs of what it comes to only.

    Where no batch of up to ``max_num_seqs`` requests decodes plainly, the largest does.

    Examples
    --------
    >>> with_plain_steps([(1, 4, 63), (5, 8, 31), (9, 9, 0)], 6)
    [(1, 4, 63), (5, 5, 31), (6, 6, 0)]
    """
    if max_num_seqs < 2 or any(first <= max_num_seqs and n == 0 for first, _, n in schedule):
        return schedule
    kept = [
        (first, min(last, max_num_seqs - 1), nodes)
        for first, last, nodes in schedule
        if first < max_num_seqs
    ]
    return [*kept, (kept[-1][1] + 1, max_num_seqs, 0)]


def parse_speculative_model(value: str) -> str:
    """``medusa:PATH`` -> ``PATH``.

    Raises
    ------
    ValueError
        When the prefix or the path is missing.
    """
    if not isinstance(value, str) or not value.startswith(MEDUSA_PREFIX):
        raise ValueError(
            f"speculative_model={value!r} is not understood: write {MEDUSA_PREFIX}<path of the "
            "heads>, or use --speculative-config for vLLM's own methods"
        )
    path = value[len(MEDUSA_PREFIX) :]
    if not path:
        raise ValueError(f"speculative_model={value!r} names no heads after {MEDUSA_PREFIX!r}")
    return path
