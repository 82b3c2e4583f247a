"""Typical acceptance against a plain float64 reading of the paper's section 2.3.1."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_medusa.kernels import WalkOutput, tree_walk
from vllm_medusa.tree import TokenTree
from vllm_medusa.triton_kernels.reference import path_rows

pytest.importorskip("vllm")

from vllm_medusa.tree_batch import TreeBatch
from vllm_medusa.typical_acceptance import TypicalAcceptance

VOCAB = 12
TREES = {
    "preset": TokenTree.preset("mc_sim_7b_63").cut(40),
    "63 nodes": TokenTree.preset("mc_sim_7b_63"),
    "100 nodes": TokenTree.from_widths([4, 4, 5]),
    "wide": TokenTree.from_widths([4, 2, 1]),
    "chain": TokenTree.from_paths([[0], [0, 0], [0, 0, 0]]),
}
EXACT, TYPICAL = "exact", "typical"


def options(rule: str, epsilon: float, delta: float) -> SimpleNamespace:
    return SimpleNamespace(typical=rule == TYPICAL, typical_epsilon=epsilon, typical_delta=delta)


def plain_path(tree, logits, tokens, epsilon, delta) -> list[int]:
    """Rows of the chosen path, root included; all in float64 and with nothing clever."""
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)

    def accepted(row: int) -> bool:
        given = probs[tree.parents[row]]
        entropy = -sum(p * math.log(p) for p in given if p > 0)
        threshold = min(epsilon, delta * math.exp(-entropy))
        return tokens[row] >= 0 and given[tokens[row]] > threshold

    best, best_key = [0], (0, 0.0)
    for leaf in range(1, len(tokens)):
        path = [leaf]
        while path[0] != 0:
            path.insert(0, tree.parents[path[0]])
        if all(accepted(row) for row in path[1:]):
            total = sum(math.log(probs[tree.parents[row]][tokens[row]]) for row in path[1:])
            if (len(path) - 1, total) > best_key:
                best, best_key = path, (len(path) - 1, total)
    return best


def random_step(rng, tree: TokenTree, num_reqs: int):
    """Logits, own tokens and drawn tokens of a batch of cut trees, like top-k drafts."""
    counts = rng.integers(1, tree.num_rows + 1, size=num_reqs)
    total = int(counts.sum())
    logits = rng.normal(size=(total, VOCAB)) * rng.choice([0.5, 1.5, 3.0], size=(total, 1))
    # As top-k leaves it.
    logits[rng.random((total, VOCAB)) < 0.2] = -np.inf
    logits[:, 0] = 0.0
    by_rank = np.stack([rng.permutation(VOCAB) for _ in range(tree.max_depth)])
    tokens = np.concatenate(
        [
            [0, *(by_rank[tree.depths[row] - 1, tree.ranks[row]] for row in range(1, count))]
            for count in counts
        ]
    )
    return counts, logits, tokens, rng.integers(0, VOCAB, size=total)


@pytest.mark.parametrize("name", TREES)
def test_walk_takes_the_typical_path(name):
    tree, rng = TREES[name], np.random.default_rng(7)
    max_num_reqs, deeper = 9, 0
    for step in range(60):
        batch = TreeBatch(tree, max_num_reqs, torch.device("cpu"))
        rule = TypicalAcceptance(batch)
        num_reqs = int(rng.integers(1, 7))
        slots = rng.permutation(max_num_reqs)[:num_reqs]
        asked = {}
        for slot in slots:
            kind = TYPICAL if step == 0 or rng.random() < 0.7 else EXACT
            asked[slot] = (kind, float(rng.choice([0.09, 0.3])), float(rng.choice([0.3, 1.0])))
            rule.add_request(int(slot), options(*asked[slot]), greedy=False)
        counts, logits, tokens, drawn = random_step(rng, tree, num_reqs)
        ready = rng.random(num_reqs) < 0.9
        cu_rows = np.concatenate([[0], np.cumsum(counts)])
        # A node whose token is not known.
        tokens[rng.random(len(tokens)) < 0.03] = -1

        typical = rule.active[slots]
        per_row = torch.from_numpy(np.repeat(slots, counts))
        local_pos = torch.from_numpy(np.concatenate([np.arange(c) for c in counts])).int()
        ids = torch.from_numpy(tokens).int()
        steered = torch.from_numpy(drawn), ids, torch.full((num_reqs,), 128, dtype=torch.int32)
        if typical.any():
            which = np.flatnonzero(np.repeat(typical, counts))
            scores = rule.score(torch.from_numpy(logits).float(), ids, per_row, local_pos, which)
            steered = rule.steer(
                scores,
                np.flatnonzero(typical),
                *steered[:2],
                torch.from_numpy(cu_rows).int(),
                torch.from_numpy(slots),
                torch.from_numpy(ready),
            )
        new_drawn, new_tokens, limits = steered
        out = WalkOutput.empty(num_reqs, len(tokens), tree.num_rows, torch.device("cpu"))
        # Roots of requests that are not ready lie inside their prompts.
        prompts = torch.zeros(batch.parents.shape[0], dtype=torch.int32)
        prompts[slots] = torch.from_numpy(np.where(ready, 1, 3)).int()
        tree_walk(
            out,
            new_drawn,
            new_tokens,
            torch.full((len(tokens),), 2),
            torch.from_numpy(cu_rows).int(),
            torch.full((num_reqs,), 99, dtype=torch.int32),
            torch.from_numpy(slots),
            batch.parents,
            prompts,
            accept_limits=limits,
        )
        for index, slot in enumerate(slots):
            rows = slice(cu_rows[index], cu_rows[index + 1])
            kind, epsilon, delta = asked[slot]
            if not ready[index]:
                path = [0]
            elif kind == TYPICAL:
                path = plain_path(tree, logits[rows], tokens[rows], epsilon, delta)
            else:
                path = exact_path(tree, drawn[rows], tokens[rows])
            deeper += kind == TYPICAL and len(path) > 2
            expected = [int(tokens[rows][row]) for row in path[1:]] + [int(drawn[rows][path[-1]])]
            assert out.num_sampled[index] == len(path)
            assert out.tokens[index, : len(path)].tolist() == expected
            assert path_rows(out.path_masks[index].tolist()) == path
            assert out.last_rows[index] == cu_rows[index] + path[-1]
    assert deeper > 5


def exact_path(tree, drawn, tokens) -> list[int]:
    path = [0]
    while True:
        children = [
            row
            for row in range(1, len(tokens))
            if tree.parents[row] == path[-1] and tokens[row] == drawn[path[-1]]
        ]
        if not children:
            return path
        path.append(children[0])


def test_a_greedy_request_is_exact():
    rule = TypicalAcceptance(TreeBatch(TREES["wide"], 2, torch.device("cpu")))
    rule.add_request(0, options(TYPICAL, 0.09, 0.3), greedy=True)
    rule.add_request(1, options(TYPICAL, 0.09, 0.3), greedy=False)
    assert rule.active.tolist() == [False, True]
    # The slot's next request asks for nothing.
    rule.add_request(1, options(EXACT, 0.09, 0.3), greedy=False)
    assert not rule.active.any()
