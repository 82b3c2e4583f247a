"""What one request may ask of Medusa, in vLLM's ``extra_args`` (``vllm_xargs`` over HTTP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_medusa.config import ACCEPTANCE_RULES, MAX_TREE_NODES, check_acceptance

PREFIX = "medusa_"


@dataclass(frozen=True)
class RequestOptions:
    """A request's own settings, the server's where it has none.

    Attributes
    ----------
    nodes : int or None
        At most this many nodes are verified per step; 0 switches speculation off for
        this request, None leaves the server's tree.
    acceptance : str
        ``exact`` or ``typical``.
    typical_epsilon, typical_delta : float
        Parameters of typical acceptance.
    """

    nodes: int | None
    acceptance: str
    typical_epsilon: float
    typical_delta: float

    @property
    def typical(self) -> bool:
        """Whether typical acceptance is asked for; a greedy request is exact all the same."""
        return self.acceptance == "typical"

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None, server: Any) -> RequestOptions:
        """Read the keys that start with ``medusa_``.

        Parameters
        ----------
        extra_args : mapping or None
            ``SamplingParams.extra_args``; other keys are other people's.
        server : MedusaSpeculativeConfig
            Holds the defaults.

        Raises
        ------
        ValueError
            On an unknown key or an impossible value, naming both and what is possible.
        """
        given = {
            key.removeprefix(PREFIX): value
            for key, value in (extra_args or {}).items()
            if key.startswith(PREFIX)
        }
        unknown = sorted(set(given) - set(cls.__annotations__))
        if unknown:
            known = ", ".join(PREFIX + name for name in cls.__annotations__)
            raise ValueError(
                f"extra_args key {PREFIX + unknown[0]!r} has no meaning for Medusa; known keys: "
                f"{known}"
            )
        nodes = given.get("nodes")
        if nodes is not None and not (type(nodes) is int and 0 <= nodes <= MAX_TREE_NODES):
            raise ValueError(
                f"{PREFIX}nodes={nodes!r} is the request's node budget and must be an integer "
                f"from 0 (no speculation) to {MAX_TREE_NODES}"
            )
        acceptance = given.get("acceptance", server.acceptance)
        epsilon, delta = check_acceptance(
            acceptance,
            given.get("typical_epsilon", server.typical_epsilon),
            # A request that brings its own epsilon brings its own square root.
            given.get(
                "typical_delta", None if "typical_epsilon" in given else server.typical_delta
            ),
            PREFIX,
        )
        for name in ("typical_epsilon", "typical_delta"):
            if name in given and acceptance != "typical":
                raise ValueError(
                    f"{PREFIX}{name}={given[name]!r} has no meaning for a request with "
                    f"{acceptance} acceptance; add {PREFIX}acceptance={ACCEPTANCE_RULES[1]!r}"
                )
        return cls(nodes, acceptance, epsilon, delta)


def reads_history(params: Any) -> bool:
    """Whether one of vLLM's processors looks back over the drafts before a request's row."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.bad_words
        or getattr(params, "thinking_token_budget", None) is not None
    )


def keeps_start_up_tree(params: Any) -> bool:
    """Whether a request's tree is laid out on the host, which knows the start-up tree only.

    Parameters
    ----------
    params : vllm.SamplingParams
        With structured outputs the scheduler walks the tree; processors that look back see its
        paths as chains.
    """
    return params.structured_outputs is not None or reads_history(params)
