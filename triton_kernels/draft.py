"""Fill token trees from the heads' logits: top tokens of every head, and their nodes, at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable
from .checks_draft import check_draft_tree
from .draft_workspace import GROUP, DraftWorkspace, groups_and_warps, num_groups
from .noise import load_draw, with_noise
from .noise_types import DrawNoise, arguments_of

# 128 x 128 bfloat16 are 128 bytes a thread of 8 warps, and leave room for five programs.
_MOST_GROUPS = 128
_LEAST: tl.constexpr = tl.constexpr(-(2**31))  # below the key of -inf


@triton.jit
def sortable(values):
    """float32 -> int32 of the same order; -0 and +0 are one key."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def known(values):
    """float32, NaN as -inf."""
    values = values.to(tl.float32)
    return tl.where(values == values, values, float("-inf"))


@triton.jit
def load_groups(
    row_logits,  # [vocab_size], one row of logits
    groups,  # [GROUPS_PER_PROGRAM] int32, neighbours
    first,  # the first of them
    vocab_size,
    GROUP: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
):
    """[GROUPS_PER_PROGRAM, GROUP] logits, -inf beyond the vocabulary."""
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if (first + GROUPS_PER_PROGRAM) * GROUP <= vocab_size:
        # No mask, since one of odd length would forbid 16-byte loads.
        values = tl.load(row_logits + ids)
    else:
        values = tl.load(row_logits + ids, mask=ids < vocab_size, other=float("-inf"))
    return values


@triton.jit
def _best(keys, ids, TAKEN: tl.constexpr, NO_ID: tl.constexpr):
    """Lowest id among the largest keys, and the keys without it."""
    largest = tl.max(keys, axis=None)
    best = tl.min(tl.where(keys == largest, ids, NO_ID), axis=None)
    return best, tl.where(ids == best, TAKEN, keys)


@triton.jit
def merge_groups(
    row_logits,  # [vocab_size], one row of logits
    maxima,  # [num_groups] int32, keys of its groups' maxima
    num_best,  # how many tokens are wanted, at most PADDED_TOP
    row_map,  # as with_noise's, like the next three
    hash_state,
    temperature,
    spread,
    vocab_size,
    num_groups,
    GROUP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_TOP: tl.constexpr,
):
    """[PADDED_TOP] int32: the best tokens of a row, best first.

    The k best tokens lie in the k groups with the best maxima, ties by id included: a token
    of any other group has k better ones, the best of those groups.
    """
    all_groups = tl.arange(0, PADDED_GROUPS)
    slots = tl.arange(0, PADDED_TOP)
    # Other multiprocessors wrote the maxima: read them where they all meet, in L2.
    keys = tl.load(
        maxima + all_groups, mask=all_groups < num_groups, other=_LEAST, cache_modifier=".cg"
    )
    groups = tl.zeros([PADDED_TOP], tl.int32)
    for i in range(0, tl.minimum(num_best, num_groups)):
        group, keys = _best(keys, all_groups, _LEAST, PADDED_GROUPS)
        groups = tl.where(slots == i, group, groups)

    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_candidate = (slots < tl.minimum(num_best, num_groups))[:, None] & (ids < vocab_size)
    values = known(tl.load(row_logits + ids, mask=is_candidate, other=float("-inf")))
    values = with_noise(values, ids, is_candidate, row_map, hash_state, temperature, spread)
    keys = tl.where(is_candidate, sortable(values), _LEAST)
    # Slots without a group repeat group 0; their ids must not be found.
    ids = tl.where(is_candidate, ids, PADDED_GROUPS * GROUP)
    tokens = tl.zeros([PADDED_TOP], tl.int32)
    for i in range(0, num_best):
        token, keys = _best(keys, ids, _LEAST, PADDED_GROUPS * GROUP)
        tokens = tl.where(slots == i, token, tokens)
    return tokens


@triton.jit(do_not_specialize=["depth"])
def _draft_tree_kernel(
    out,  # out [R, N] int64
    counters,  # in-place [R * NUM_HEADS] int32, 0 on entry and on return
    maxima,  # scratch [R * NUM_HEADS, num_groups] int32
    logits,  # in [R, NUM_HEADS, vocab_size]
    node_columns,  # in [N] int64, node -> (head, rank) as head * NUM_TOP + rank
    token_map,  # in [1 or NUM_HEADS, vocab_size] int64, or None
    seeds,  # in [S] int64, or None: no noise, and the next three are not read
    temperatures,  # in [S] float32
    lengths,  # in [S] int32
    slots,  # in [R] int64 or int32
    depth,  # of the first head's nodes
    spread,
    out_stride,
    req_stride,
    head_stride,
    map_stride,  # 0: one map for all heads
    vocab_size,
    num_groups,
    DEPTH_STEP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    NUM_TOP: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
    PADDED_NODES: tl.constexpr,
    PADDED_TOP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
):
    """Grid: (R * NUM_HEADS * chunks,), a chunk being GROUPS_PER_PROGRAM groups.

    Every program writes the maxima of its groups; the one that finishes a row of logits last
    finds that row's best tokens and fills the nodes of its head.
    """
    num_chunks = tl.cdiv(num_groups, GROUPS_PER_PROGRAM)
    row = tl.program_id(0) // num_chunks
    req, head = row // NUM_HEADS, row % NUM_HEADS
    row_logits = logits + req.to(tl.int64) * req_stride + head.to(tl.int64) * head_stride
    row_maxima = maxima + row.to(tl.int64) * num_groups
    first = tl.program_id(0) % num_chunks * GROUPS_PER_PROGRAM
    groups = first + tl.arange(0, GROUPS_PER_PROGRAM)
    values = known(load_groups(row_logits, groups, first, vocab_size, GROUP, GROUPS_PER_PROGRAM))
    row_map = None
    if token_map is not None:
        row_map = token_map + head.to(tl.int64) * map_stride
    own_depth = depth + head * DEPTH_STEP
    hash_state, temperature = load_draw(seeds, temperatures, lengths, slots, req, own_depth)
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_token = ids < vocab_size
    values = with_noise(values, ids, is_token, row_map, hash_state, temperature, spread)
    group_keys = sortable(tl.max(values, 1))
    tl.store(row_maxima + groups, group_keys, mask=groups < num_groups)
    # All threads' maxima are written before one thread announces them; acquire and release
    # order them with the reads of the program that comes last.
    tl.debug_barrier()
    num_done = tl.atomic_add(counters + row, 1, sem="acq_rel") + 1
    if num_done < num_chunks:
        return
    tl.store(counters + row, 0)

    nodes = tl.arange(0, PADDED_NODES)
    columns = tl.load(node_columns + nodes, mask=nodes < NUM_NODES, other=-1).to(tl.int32)
    is_mine = (nodes < NUM_NODES) & (columns // NUM_TOP == head)
    ranks = tl.where(is_mine, columns % NUM_TOP, 0)
    num_best = tl.max(tl.where(is_mine, ranks + 1, 0))
    tokens = merge_groups(
        row_logits, row_maxima, num_best, row_map, hash_state, temperature, spread, vocab_size,
        num_groups, GROUP, PADDED_GROUPS, PADDED_TOP,
    ).to(tl.int64)  # fmt: skip
    all_ranks = tl.arange(0, PADDED_TOP)
    if row_map is not None:
        tokens = tl.load(row_map + tokens, mask=all_ranks < num_best, other=-1)
    found = tl.sum(tl.where(ranks[:, None] == all_ranks[None, :], tokens[None, :], 0), 1)
    tl.store(out + req.to(tl.int64) * out_stride + nodes, found, mask=is_mine)


def draft_tree(
    out: torch.Tensor,
    logits: torch.Tensor,
    node_columns: torch.Tensor,
    *,
    num_top: int,
    token_map: torch.Tensor | None = None,
    noise: DrawNoise | None = None,
    workspace: DraftWorkspace | None = None,
) -> None:
    """Draft token of every node: the token of its rank under its head (paper, section 2.1.2).

    Among equal logits the lower id comes first, so every route drafts the same; NaN counts
    as -inf.

    Parameters
    ----------
    out : torch.Tensor
        ``[>= R, N]`` int64. Draft tokens in node order.
    logits : torch.Tensor
        ``[R, K, V]`` bfloat16, float16 or float32, any strides but a dense last dimension; the
        heads' vocabulary, V <= 524288.
    node_columns : torch.Tensor
        ``[N]`` int64. Node -> ``head * num_top + rank``, N <= 127.
    num_top : int
        Largest number of ranks of a head, at most 128.
    token_map : torch.Tensor, optional
        ``[1 or K, V]`` int64. Heads' vocabulary id -> base vocabulary id.
    noise : DrawNoise, optional
        Added to the logits of requests that have a temperature.
    workspace : DraftWorkspace, optional
        Serves any number of calls, one after another; allocated when missing.

    Examples
    --------
    Two heads, two ranks, node columns ``0 1 2`` (both ranks of head 1, the best of head 2): with
    logits ``[[[1, 5, 3], [9, 2, 9]]]`` the nodes get tokens ``1 2 0``.
    """
    check_draft_tree(
        out, logits, node_columns, num_top=num_top, token_map=token_map, noise=noise,
        workspace=workspace,
    )  # fmt: skip
    check_runnable("logits", logits, _draft_tree_kernel)
    num_reqs, num_heads, vocab = logits.shape
    if num_reqs == 0:
        return
    num_rows, groups = num_reqs * num_heads, num_groups(vocab)
    workspace = workspace or DraftWorkspace.allocate(num_rows, vocab, logits.device)
    per_program, num_warps = groups_and_warps(num_rows, vocab, _MOST_GROUPS)
    drawn, depth_step = arguments_of(noise)
    _draft_tree_kernel[(num_rows * triton.cdiv(groups, per_program),)](
        out, workspace.counters, workspace.maxima, logits, node_columns, token_map,
        *drawn, out.stride(0), logits.stride(0), logits.stride(1),
        0 if token_map is None or token_map.shape[0] == 1 else token_map.stride(0),
        vocab, groups, DEPTH_STEP=depth_step, NUM_HEADS=num_heads,
        NUM_NODES=node_columns.shape[0], NUM_TOP=num_top, GROUP=GROUP,
        GROUPS_PER_PROGRAM=per_program,
        PADDED_NODES=triton.next_power_of_2(node_columns.shape[0]),
        PADDED_TOP=triton.next_power_of_2(num_top),
        PADDED_GROUPS=triton.next_power_of_2(groups), num_warps=num_warps,
    )  # fmt: skip
