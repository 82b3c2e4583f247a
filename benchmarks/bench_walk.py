"""What a step does after the draw: walk, next drafts, positions and masks, beside PyTorch.

    python benchmarks/bench_walk.py --out record.json [--quick]

Not measured: the heads' products and the KV move (see bench_kv_compaction.py).  `all` is one
CUDA graph of the three launches that a served step makes: tree_walk (path, tokens, counts,
hidden row, request state), draft_tree (top tokens of every head into their nodes) and scatter_tree
(positions and masks).  The peer does the same with PyTorch's operators, loops over requests
written as tensor operations so that it fits a graph too.  `chosen` is the draft of a tree that is
chosen at every step: `top` (top tokens with log probabilities), `lookup` (what followed the newest
tokens before, in a history that repeats itself) and `tree` (the likeliest nodes of both) in one
graph, in place of `draft`.  The kernels' results are compared with the twins' before they are
timed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from records import write_record
from timing import BANDWIDTH, kernel_benchmark_parser, parse_on_gpu, time_gpu

from vllm_medusa.config import DEFAULT_LOOKUP
from vllm_medusa.prompt_lookup import PromptLookup
from vllm_medusa.tree_candidates import candidate_paths, candidate_tables, head_ranks, head_weights
from vllm_medusa.triton_kernels import (
    best_tree,
    draft_tree,
    reference,
    scatter_tree,
    top_tokens,
    tree_walk,
)
from vllm_medusa.triton_kernels.draft_workspace import DraftWorkspace
from vllm_medusa.triton_kernels.lookup_types import Chains
from vllm_medusa.triton_kernels.tree_types import Candidates, FixedTree, TreeTables
from vllm_medusa.triton_kernels.walk_types import RequestState, WalkOutput

DEVICE = torch.device("cuda")
ROWS = 64
MAX_LEN = 8192
CONTEXT = 1000
NUM_TOP = 10
NAMES = ("walk", "draft", "scatter", "all", "top", "lookup", "tree", "chosen")


class Shape(NamedTuple):
    """`accepted` nodes of 63 on every path, one head per depth."""

    batch: int
    heads: int
    vocab: int
    hidden: int
    accepted: int = 3

    def __str__(self) -> str:
        return f"bs{self.batch:<3} {self.heads} heads x{self.vocab:<6} hidden{self.hidden:<4}"


MODELS = [(5, 32_000, 4096), (4, 49_152, 576), (4, 128_256, 4096), (5, 128_256, 4096)]
SHAPES = [Shape(batch, *model) for model in MODELS for batch in (1, 8, 64)]
QUICK_SHAPES = [shape for shape in SHAPES if shape.batch != 8 and shape.heads != 4]


class Tree(NamedTuple):
    """A random tree of 63 nodes, no deeper than there are heads."""

    parents: list[int]
    depths: list[int]
    masks: list[int]
    columns: list[int]  # node -> head * NUM_TOP + rank


def make_tree(max_depth: int) -> Tree:
    """The same tree for every call; each depth occurs."""
    rng = random.Random(max_depth)
    tree = Tree([-1], [0], [1], [])
    children = [0] * ROWS
    for row in range(1, ROWS):
        parent = row - 1 if row <= max_depth else -1
        while parent < 0 or tree.depths[parent] == max_depth or children[parent] == NUM_TOP:
            parent = rng.randrange(row)
        tree.parents.append(parent)
        tree.depths.append(tree.depths[parent] + 1)
        tree.masks.append(tree.masks[parent] | 1 << row)
        tree.columns.append(tree.depths[parent] * NUM_TOP + children[parent])
        children[parent] += 1
    return tree


class ChosenTrees:
    """Tensors of a draft whose trees are chosen by the heads' probabilities."""

    def __init__(self, step: Step):
        shape = step.shape
        ranks = head_ranks(ROWS - 1, shape.heads, shape.vocab)
        paths = candidate_paths(ROWS - 1, ranks)
        tables = candidate_tables(paths, shape.heads, max(ranks))
        self.weights = torch.tensor(head_weights(shape.heads), device=DEVICE)
        self.candidates = Candidates(*(torch.from_numpy(table).to(DEVICE) for table in tables))
        self.tables = TreeTables(step.parents.clone(), step.depths.clone(), step.masks.clone())
        self.fixed = FixedTree(
            torch.zeros(shape.batch, dtype=torch.int32, device=DEVICE),
            torch.zeros(ROWS - 1, dtype=torch.int32, device=DEVICE),
            *(table[0].clone() for table in self.tables),
        )
        size = (shape.batch, shape.heads, max(ranks))
        self.tokens = torch.zeros(size, dtype=torch.int64, device=DEVICE)
        self.log_probs = torch.zeros(size, device=DEVICE)
        self.drafts = torch.zeros_like(step.drafts)
        self.scratch = torch.zeros(step.drafts.numel(), dtype=torch.int32, device=DEVICE)
        self.slots, self.logits, self.workspace = step.slots, step.logits, step.workspace
        generator = torch.Generator(DEVICE).manual_seed(0)
        history = torch.randint(
            shape.vocab, (shape.batch, MAX_LEN), generator=generator, device=DEVICE,
            dtype=torch.int32,
        )  # fmt: skip
        history[:, CONTEXT - 8 : CONTEXT] = history[:, 100:108]
        lengths = torch.full((shape.batch,), CONTEXT, dtype=torch.int32, device=DEVICE)
        self.history = PromptLookup(history, lengths, DEFAULT_LOOKUP, shape.vocab)

    def top(self) -> None:
        top_tokens(
            self.tokens, self.log_probs, self.logits, weights=self.weights,
            workspace=self.workspace,
        )  # fmt: skip

    def tree_inputs(self) -> tuple:
        return self.tokens, self.log_probs, self.slots, self.candidates, self.fixed

    def lookup(self) -> None:
        self.history.find(self.slots)

    def tree(self) -> None:
        best_tree(
            self.drafts, self.tables, *self.tree_inputs(), chains=self.history.chains,
            scratch=self.scratch,
        )  # fmt: skip

    def draft(self) -> None:
        self.top()
        self.lookup()
        self.tree()

    def is_correct(self) -> bool:
        """Tokens and, from the same log probabilities, trees of the twins."""
        self.draft()
        tokens, log_probs = torch.empty_like(self.tokens), torch.empty_like(self.log_probs)
        reference.top_tokens(tokens, log_probs, self.logits, weights=self.weights)
        drafts = torch.empty_like(self.drafts)
        tables = TreeTables(*(table.clone() for table in self.tables))
        for table in tables:
            table[:, 1:] = -1
        found = self.history.chains
        chains = Chains(
            torch.empty_like(found.tokens), torch.empty_like(found.matches), found.costs
        )
        reference.lookup_chain(
            chains.tokens, chains.matches, self.history.history, self.history.lengths, self.slots,
            vocab_size=self.history.vocab_size,
        )  # fmt: skip
        reference.best_tree(drafts, tables, *self.tree_inputs(), chains=chains)
        pairs = [(self.tokens, tokens), (self.drafts, drafts), *zip(found, chains, strict=True)]
        pairs += zip(self.tables, tables, strict=True)
        close = torch.allclose(self.log_probs, log_probs, rtol=1e-5, atol=1e-5)
        return close and all(torch.equal(a, b) for a, b in pairs)


class Step:
    """Tensors of one step of a batch; every request's path is the first `accepted` rows."""

    def __init__(self, shape: Shape):
        self.shape, self.tree = shape, make_tree(shape.heads)
        num_reqs, num_logits = shape.batch, shape.batch * ROWS
        generator = torch.Generator(DEVICE).manual_seed(0)

        def table(row: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(row, dtype=dtype, device=DEVICE).expand(num_reqs, -1).contiguous()

        def full(value: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full((num_reqs,), value, dtype=dtype, device=DEVICE)

        self.parents = table(self.tree.parents, torch.int32)
        self.depths = table(self.tree.depths, torch.int32)
        words = [mask - (mask >> 63 << 64) for mask in self.tree.masks]
        self.masks = table(words, torch.int64)
        self.step_masks = torch.zeros_like(self.masks)
        self.columns = torch.tensor(self.tree.columns, device=DEVICE)
        self.draft_tokens = torch.arange(ROWS, device=DEVICE).repeat(num_reqs).to(torch.int32)
        self.sampled = torch.full((num_logits,), 1000, device=DEVICE)
        for row in range(shape.accepted):
            self.sampled[row::ROWS] = row + 1  # rows 0, 1, 2, .. are a chain in every tree
        self.positions = CONTEXT + torch.arange(ROWS, device=DEVICE).repeat(num_reqs)
        self.cu_rows = torch.arange(num_reqs + 1, dtype=torch.int32, device=DEVICE) * ROWS
        self.seq_lens, self.prefill = full(CONTEXT + ROWS), full(10)
        self.slots = torch.randperm(num_reqs, generator=generator, device=DEVICE)
        self.hidden_states = torch.randn(
            num_logits, shape.hidden, generator=generator, device=DEVICE, dtype=torch.bfloat16
        )
        self.logits = torch.randn(
            num_reqs, shape.heads, shape.vocab, generator=generator, device=DEVICE,
            dtype=torch.bfloat16,
        )  # fmt: skip
        self.state = RequestState(
            full(CONTEXT), full(0, torch.int64), full(CONTEXT),
            torch.zeros(num_reqs, MAX_LEN, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
        self.walk = WalkOutput.empty(num_reqs, 0, ROWS, DEVICE)._replace(
            flat_rows=None, hidden=torch.empty_like(self.hidden_states[:num_reqs])
        )
        self.drafts = torch.zeros(num_reqs, ROWS - 1, dtype=torch.int64, device=DEVICE)
        self.workspace = DraftWorkspace.allocate(num_reqs * shape.heads, shape.vocab, DEVICE)
        self.chosen = ChosenTrees(self)

    def walk_inputs(self) -> tuple[torch.Tensor, ...]:
        return (
            self.sampled, self.draft_tokens, self.positions, self.cu_rows, self.seq_lens,
            self.slots, self.parents, self.prefill,
        )  # fmt: skip

    def scatter_inputs(self) -> tuple:
        return (
            self.positions, self.step_masks, self.cu_rows, self.cu_rows, self.slots, self.depths,
            self.masks, self.shape.batch,
        )  # fmt: skip


def kernels(step: Step) -> dict[str, Callable[[], None]]:
    """This package's launches."""

    def walk() -> None:
        tree_walk(
            step.walk, *step.walk_inputs(), hidden_states=step.hidden_states, state=step.state
        )

    def draft() -> None:
        draft_tree(
            step.drafts, step.logits, step.columns, num_top=NUM_TOP, workspace=step.workspace
        )

    def scatter() -> None:
        scatter_tree(*step.scatter_inputs())

    def everything() -> None:
        walk()
        draft()
        scatter()

    chosen = step.chosen
    return {
        "walk": walk, "draft": draft, "scatter": scatter, "all": everything,
        "top": chosen.top, "lookup": chosen.lookup, "tree": chosen.tree, "chosen": chosen.draft,
    }  # fmt: skip


def torch_walk(step: Step) -> None:
    """The walk and what follows from it, all requests at once, one round per depth."""
    num_reqs, state = step.shape.batch, step.state
    sampled, drafts = step.sampled.view(num_reqs, ROWS), step.draft_tokens.view(num_reqs, ROWS)
    parents = step.parents[step.slots]
    ready = step.positions.view(num_reqs, ROWS)[:, 0] >= step.prefill[step.slots]
    limits = ROWS * ready
    rows = torch.arange(ROWS, device=DEVICE)
    current = torch.zeros(num_reqs, 1, dtype=torch.int64, device=DEVICE)
    masks, length = torch.ones_like(current), torch.ones_like(current)
    walking = (limits > 0)[:, None]
    tokens = [sampled.gather(1, current)]
    for _ in range(step.shape.heads):
        match = (parents == current) & (drafts == sampled.gather(1, current)) & (rows > current)
        walking = walking & match.any(1, keepdim=True) & (length <= limits[:, None])
        current = torch.where(walking, match.int().argmax(1, keepdim=True), current)
        masks = torch.where(walking, masks | (1 << current), masks)
        length = length + walking
        tokens.append(torch.where(walking, sampled.gather(1, current), -1))
    accepted = torch.cat(tokens, 1)
    out = step.walk
    out.tokens.fill_(-1)
    out.tokens[:, : accepted.shape[1]] = accepted
    out.tokens[:, -1:] = masks
    out.num_sampled.copy_(length[:, 0])
    out.num_rejected.copy_(ROWS - length[:, 0])
    out.path_masks.copy_(masks[:, 0])
    out.root_positions.copy_(step.positions.view(num_reqs, ROWS)[:, 0])
    out.last_rows.copy_(step.cu_rows[:-1] + current[:, 0])
    torch.index_select(step.hidden_states, 0, out.last_rows, out=out.hidden)
    places = state.total_len[step.slots][:, None] + torch.arange(len(tokens), device=DEVICE)
    # Places behind the path are overwritten by the next step.
    state.all_token_ids[step.slots[:, None], places] = accepted.int()
    state.last_sampled[step.slots] = sampled.gather(1, current)[:, 0]
    state.total_len[step.slots] += length[:, 0].int()
    state.num_computed_tokens[step.slots] += length[:, 0].int()


def torch_draft(step: Step) -> None:
    """torch.topk over the vocabulary, then the nodes by their columns."""
    top = step.logits.topk(NUM_TOP, dim=-1).indices
    torch.index_select(top.flatten(1), 1, step.columns, out=step.drafts)


def torch_scatter(step: Step) -> None:
    """Positions of the depths and masks in batch order."""
    positions = step.positions.view(-1, ROWS)
    positions.copy_(positions[:, :1] + step.depths[step.slots])
    step.step_masks.copy_(step.masks[step.slots])


def torch_peers(step: Step) -> dict[str, Callable[[], None]]:
    """The same parts with PyTorch's operators."""
    parts = {"walk": torch_walk, "draft": torch_draft, "scatter": torch_scatter}

    def everything() -> None:
        for part in parts.values():
            part(step)

    return {name: lambda part=part: part(step) for name, part in parts.items()} | {
        "all": everything
    }


def is_correct(step: Step) -> bool:
    """Kernels against the twins, every output to the bit."""

    def copies(tensors: tuple) -> list[torch.Tensor | None]:
        return [t.cpu() if isinstance(t, torch.Tensor) else t for t in tensors]

    walk, state = WalkOutput(*copies(step.walk)), RequestState(*copies(step.state))
    reference.tree_walk(
        walk, *copies(step.walk_inputs()), hidden_states=step.hidden_states.cpu(), state=state
    )
    drafts = torch.empty_like(step.drafts)
    reference.draft_tree(drafts, step.logits, step.columns, num_top=NUM_TOP)
    positions, step_masks, *rest = copies(step.scatter_inputs())
    reference.scatter_tree(positions, step_masks, *rest)
    kernels(step)["all"]()
    got = (*step.walk, *step.state, step.drafts, step.positions, step.step_masks)
    want = (*walk, *state, drafts, positions, step_masks)
    same = (a is None or torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))
    return all(same) and step.chosen.is_correct()


def bench_shape(shape: Shape, repeats: int) -> dict[str, Any]:
    """Check, then time every part of both."""
    step = Step(shape)
    correct = is_correct(step)
    floor = step.logits.numel() * step.logits.element_size() / BANDWIDTH * 1e6
    times = {
        side: {name: time_gpu(run, repeats=repeats).as_dict() for name, run in parts.items()}
        for side, parts in (("kernels", kernels(step)), ("torch", torch_peers(step)))
    }
    return {
        "shape": shape._asdict(), "correct": correct, "floor_us": round(floor, 2), **times
    }  # fmt: skip


def print_row(shape: Shape, row: dict[str, Any]) -> None:
    cells = [row["floor_us"]]
    cells += [row["kernels"][name]["median"] for name in NAMES]
    spread = row["kernels"]["all"]["p90"] - row["kernels"]["all"]["p10"]
    cells += [spread, row["torch"]["all"]["median"]]
    mark = "" if row["correct"] else "  WRONG"
    print(f"{shape!s:<34}" + "".join(f"{cell:9.1f}" for cell in cells) + mark, flush=True)


def main() -> None:
    args = parse_on_gpu(kernel_benchmark_parser(__doc__, "five heads, bs 1 and 64"))
    names = ("floor", *NAMES, "p90-p10", "torch")
    print(f"{'microseconds':<34}" + "".join(f"{name:>9}" for name in names))
    rows = []
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        rows.append(bench_shape(shape, args.repeats))
        print_row(shape, rows[-1])
    write_record(args.out, {"benchmark": "walk", "rows_per_request": ROWS, "rows": rows})


if __name__ == "__main__":
    main()
