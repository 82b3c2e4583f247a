"""Argument checks of drafts and their twins; integers and tensors only, no Triton here."""

from __future__ import annotations

import torch

from .checks import FLOATS, MAX_TREE_ROWS, at_least, check_tensor, require
from .draft_workspace import GROUP, MAX_TOP, DraftWorkspace, num_chunks, num_groups
from .lookup_types import MAX_MATCH, POSITION_BITS, Chains, LookupWorkspace
from .noise_types import DrawNoise
from .tree_types import Candidates, FixedTree, TreeTables

# Groups of one row that the merging program holds at once: 4096 of them are 524,288 tokens.
MAX_GROUPS = 4096
MAX_NODES = MAX_TREE_ROWS - 1  # the root is drawn by the target
# Nodes of a tree that is chosen on the device: its masks have one word.
MAX_CHOSEN_NODES = 63
# Candidates that the program of a request holds at once; their counts share an int32.
MAX_CANDIDATES = 4096



def check_draft_tree(
    out: torch.Tensor,
    logits: torch.Tensor,
    node_columns: torch.Tensor,
    *,
    num_top: int,
    token_map: torch.Tensor | None,
    noise: DrawNoise | None,
    workspace: DraftWorkspace | None,
) -> None:
    """Raise ValueError unless the arguments are what ``draft_tree`` documents."""
    device = logits.device
    num_reqs, num_heads, vocab = _check_logits(logits, token_map)
    low = min(vocab, MAX_TOP)
    require(1 <= num_top <= low, "num_top", num_top, f"1..{low} (vocabulary, kernel)")
    check_tensor("node_columns", node_columns, shape=[None], dtype=torch.int64, device=device)
    nodes = node_columns.shape[0]
    require(1 <= nodes <= MAX_NODES, "node_columns", f"{nodes} nodes", f"1..{MAX_NODES} nodes")
    shape = [at_least(num_reqs), nodes]
    check_tensor("out", out, shape=shape, dtype=torch.int64, device=device)
    _check_noise(noise, num_reqs, device)
    if workspace is not None:
        rows = num_reqs * num_heads
        _check_workspace(workspace, rows, vocab, device)


def check_top_tokens(
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    logits: torch.Tensor,
    *,
    weights: torch.Tensor | None,
    token_map: torch.Tensor | None,
    columns: torch.Tensor | None,
    noise: DrawNoise | None,
    workspace: DraftWorkspace | None,
) -> None:
    """Raise ValueError unless the arguments are what ``top_tokens`` documents."""
    num_reqs, num_heads, vocab = _check_logits(logits, token_map)
    name, ranked = ("tokens", tokens) if columns is None else ("columns", columns)
    num_top = ranked.shape[-1] if ranked.dim() else 0
    low = min(vocab, MAX_TOP)
    require(1 <= num_top <= low, name, f"{num_top} ranks", f"1..{low} (vocabulary, kernel)")
    shape = [at_least(num_reqs), num_heads, num_top]
    if columns is not None:
        _check_contiguous("columns", columns, shape[1:], torch.int32, logits.device)
        shape = [at_least(num_reqs), None]
    _check_contiguous("tokens", tokens, shape, torch.int64, logits.device)
    shape = [at_least(num_reqs), *tokens.shape[1:]]
    _check_contiguous("log_probs", log_probs, shape, torch.float32, logits.device)
    if weights is not None:
        shape = [num_heads]
        check_tensor("weights", weights, shape=shape, dtype=torch.float32, device=logits.device)
    _check_noise(noise, num_reqs, logits.device)
    if workspace is not None:
        rows = num_reqs * num_heads
        _check_workspace(workspace, rows, vocab, logits.device)
        for name, tensor, needed, dtype in (
            ("sums", workspace.sums, rows * num_chunks(vocab) * 2, torch.float32),
            ("picks", workspace.picks, rows * MAX_TOP, torch.int32),
        ):
            name, shape = f"workspace.{name}", [at_least(needed)]
            check_tensor(name, tensor, shape=shape, dtype=dtype, device=logits.device)


def check_best_tree(
    out: torch.Tensor,
    tables: TreeTables,
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    slots: torch.Tensor,
    candidates: Candidates,
    fixed: FixedTree,
    chains: Chains | None,
    scratch: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the arguments are what ``best_tree`` documents."""
    device, int32 = log_probs.device, torch.int32
    check_tensor("slots", slots, shape=[None], dtype=(torch.int64, int32), device=device)
    reqs = at_least(slots.shape[0])
    check_tensor("out", out, shape=[reqs, None], dtype=torch.int64, device=device)
    nodes = out.shape[1]
    most = MAX_CHOSEN_NODES
    require(1 <= nodes <= most, "out", f"{nodes} nodes", f"1..{most} nodes")
    _check_contiguous("tokens", tokens, [reqs, None, None], torch.int64, device)
    shape = [reqs, *tokens.shape[1:]]
    _check_contiguous("log_probs", log_probs, shape, torch.float32, device)
    check_tensor("tables.parents", tables.parents, shape=[None, nodes + 1], dtype=int32,
                 device=device)  # fmt: skip
    num_slots, width = tables.parents.shape
    depth, found = tokens.shape[1], candidates.columns.shape[-1]
    require(nodes <= found <= MAX_CANDIDATES, "candidates.columns", f"{found} candidates",
            f"{nodes} (nodes) .. {MAX_CANDIDATES} candidates")  # fmt: skip
    for name, tensor, shape, dtype in (
        ("tables.depths", tables.depths, [num_slots, width], int32),
        ("tables.masks", tables.masks, [num_slots, width], torch.int64),
        ("fixed.slots", fixed.slots, [num_slots], int32),
        ("fixed.columns", fixed.columns, [nodes], int32),
        ("fixed.parents", fixed.parents, [width], int32),
        ("fixed.depths", fixed.depths, [width], int32),
        ("fixed.masks", fixed.masks, [width], torch.int64),
    ):
        check_tensor(name, tensor, shape=shape, dtype=dtype, device=device)
    _check_contiguous("candidates.columns", candidates.columns, [depth, found], int32, device)
    _check_contiguous("candidates.ancestors", candidates.ancestors, [depth, found], int32, device)
    if chains is not None:
        _check_chains(chains, slots.shape[0], found, device)
    if scratch is not None:
        shape = [at_least(slots.shape[0] * nodes)]
        check_tensor("scratch", scratch, shape=shape, dtype=int32, device=device)


def _check_chains(
    chains: Chains, num_reqs: int, num_candidates: int, device: torch.device
) -> None:
    shape = [at_least(num_reqs), None]
    _check_contiguous("chains.tokens", chains.tokens, shape, torch.int64, device)
    length, most = chains.tokens.shape[1], MAX_CANDIDATES - num_candidates
    require(1 <= length <= most, "chains.tokens", f"{length} tokens", f"1..{most} tokens")
    shape = [at_least(num_reqs)]
    check_tensor("chains.matches", chains.matches, shape=shape, dtype=torch.int32, device=device)
    shape = [MAX_MATCH + 1, length]
    _check_contiguous("chains.costs", chains.costs, shape, torch.float32, device)


def check_lookup(
    chain: torch.Tensor,
    matches: torch.Tensor,
    history: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    vocab_size: int,
    workspace: LookupWorkspace | None,
) -> None:
    """Raise ValueError unless the arguments are what ``lookup_chain`` documents."""
    device, int32 = chain.device, torch.int32
    check_tensor("slots", slots, shape=[None], dtype=(torch.int64, int32), device=device)
    reqs = at_least(slots.shape[0])
    _check_contiguous("chain", chain, [reqs, None], torch.int64, device)
    length, most = chain.shape[1], MAX_CHOSEN_NODES
    require(1 <= length <= most, "chain", f"{length} tokens", f"1..{most} tokens")
    check_tensor("matches", matches, shape=[reqs], dtype=int32, device=device)
    check_tensor("history", history, shape=[None, None], dtype=int32, device=device)
    longest, most = history.shape[1], 2**POSITION_BITS - 1
    require(1 <= longest <= most, "history", f"{longest} tokens", f"1..{most} tokens")
    shape = [history.shape[0]]
    check_tensor("lengths", lengths, shape=shape, dtype=int32, device=device)
    require(vocab_size >= 1, "vocab_size", vocab_size, "at least 1")
    for name, tensor in ({} if workspace is None else workspace._asdict()).items():
        check_tensor(f"workspace.{name}", tensor, shape=[reqs], dtype=int32, device=device)


def _check_logits(
    logits: torch.Tensor, token_map: torch.Tensor | None
) -> tuple[int, int, int]:
    """Requests, heads and vocabulary of the heads' logits."""
    device = logits.device
    check_tensor("logits", logits, shape=[None, None, None], dtype=FLOATS, device=device)
    num_reqs, num_heads, vocab = logits.shape
    require(num_heads >= 1, "logits", f"{num_heads} heads", "at least 1")
    found, most = f"{vocab} tokens", GROUP * MAX_GROUPS
    require(1 <= vocab <= most, "logits", found, f"a vocabulary of 1..{most}")
    if token_map is not None:
        shape = [None, vocab]
        check_tensor("token_map", token_map, shape=shape, dtype=torch.int64, device=device)
        maps = token_map.shape[0]
        require(maps in (1, num_heads), "token_map", f"{maps} rows", f"1 or {num_heads} rows")
    return num_reqs, num_heads, vocab


def _check_workspace(
    workspace: DraftWorkspace, rows: int, vocab: int, device: torch.device
) -> None:
    for name, tensor, needed in (
        ("counters", workspace.counters, rows),
        ("maxima", workspace.maxima, rows * num_groups(vocab)),
    ):
        name, shape = f"workspace.{name}", [at_least(needed)]
        check_tensor(name, tensor, shape=shape, dtype=torch.int32, device=device)


def _check_noise(noise: DrawNoise | None, num_reqs: int, device: torch.device) -> None:
    if noise is None:
        return
    _check_contiguous("noise.seeds", noise.seeds, [None], torch.int64, device)
    slots = [noise.seeds.shape[0]]
    _check_contiguous("noise.temperatures", noise.temperatures, slots, torch.float32, device)
    _check_contiguous("noise.lengths", noise.lengths, slots, torch.int32, device)
    dtypes = (torch.int64, torch.int32)
    _check_contiguous("noise.slots", noise.slots, [num_reqs], dtypes, device)
    require(noise.depth >= 1, "noise.depth", noise.depth, "at least 1")
    require(noise.depth_step in (0, 1), "noise.depth_step", noise.depth_step, "0 or 1")
    require(noise.spread > 0.0, "noise.spread", noise.spread, "above 0")


def _check_contiguous(
    name: str,
    tensor: torch.Tensor,
    shape: list[int | None],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    check_tensor(name, tensor, shape=shape, dtype=dtype, device=device)
    require(tensor.is_contiguous(), name, f"strides {tensor.stride()}", "a contiguous tensor")
