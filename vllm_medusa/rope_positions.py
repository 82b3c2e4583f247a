"""Multi-dimensional RoPE (Qwen2-VL and others): tree rows take the position of their depth.

vLLM's rope state keeps positions of its own, several per token, and counts them along
the batch row; :meth:`TreeBatch.begin_step` corrects only the one-dimensional ones.
"""

from __future__ import annotations

from typing import Any

from vllm_medusa import vllm_seams
from vllm_medusa.tree_batch import TreeBatch


def follow_depths(model_state: Any, tree_batch: TreeBatch) -> None:
    """From now on a tree row's rope positions follow its depth.

    A tree starts behind the prompt, where all dimensions advance together, so every
    row is its root's position plus its depth in each of them.

    Parameters
    ----------
    model_state : vllm.v1.worker.gpu.model_states.default.DefaultModelState
        Whose ``prepare_inputs(input_batch, req_states)`` returns ``positions``
        [num_dims, num_tokens] int64.
    tree_batch : TreeBatch

    Raises
    ------
    ValueError
        When the model brings a state of another kind.

    Examples
    --------
    A root at positions (17, 17, 17) gives a node of depth 2 positions (19, 19, 19).
    """
    if getattr(model_state, "rope_state", None) is None:
        raise ValueError(
            f"Medusa finds no rope state in {type(model_state).__name__}, although the model uses "
            "M-RoPE; it cannot place tree rows there, so run this model without Medusa"
        )

    def place(inputs: dict[str, Any], input_batch: Any) -> None:
        if tree_batch.num_tree_reqs:
            for positions in inputs["positions"]:
                tree_batch.place_rows(positions, input_batch)

    vllm_seams.after_prepare_inputs(model_state, place)
