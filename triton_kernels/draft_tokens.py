"""Top tokens of every head with their log probabilities, from the heads' logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable
from .checks_draft import check_top_tokens
from .draft import known, load_groups, sortable
from .draft_workspace import (
    GROUP,
    MAX_TOP,
    DraftWorkspace,
    groups_and_warps,
    num_groups,
)
from .noise import load_draw, with_noise
from .noise_types import DrawNoise, arguments_of
from .selection import descending, ranks_of, smallest

# 64 x 128 float32 are 32 registers of 8 warps: the exponentials need them all at once.
_MOST_GROUPS = 64

# float32's largest number. Logits are cut to it, so that no infinity meets another.
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)

_NEVER: tl.constexpr = tl.constexpr(0xFFFFFFFF)  # behind every key


@triton.jit
def _finite(values):
    return tl.minimum(tl.maximum(values, -_LARGEST), _LARGEST)


@triton.jit
def _best_tokens(
    row_logits,  # [vocab_size], one row of logits
    row_maxima,  # [num_groups] int32, keys of its groups' maxima
    picks,  # scratch [NUM_TOP] int32
    row_map,  # as with_noise's, like the next three
    hash_state,
    temperature,
    spread,
    vocab_size,
    num_groups,
    NUM_TOP: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_TOP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
):
    """[PADDED_TOP] int32: the best tokens of a row in ascending order.

    They lie in the groups with the best maxima (see ``draft_tree``, which takes one after the
    other). Here a search finds the last one's key, in about 15 rounds however many are wanted.
    """
    all_groups = tl.arange(0, PADDED_GROUPS)
    # Other multiprocessors wrote the maxima: read them where they all meet, in L2.
    keys = tl.load(
        row_maxima + all_groups, mask=all_groups < num_groups, other=0, cache_modifier=".cg"
    )
    costs = tl.where(all_groups < num_groups, descending(keys), _NEVER)
    num_best = tl.minimum(NUM_TOP, num_groups)
    groups = smallest(costs, picks, num_best, PADDED_GROUPS, PADDED_TOP)
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_token = (groups >= 0)[:, None] & (ids < vocab_size)
    values = known(tl.load(row_logits + ids, mask=is_token, other=float("-inf")))
    values = with_noise(values, ids, is_token, row_map, hash_state, temperature, spread)
    costs = tl.where(is_token, descending(sortable(values)), _NEVER)
    costs = tl.reshape(costs, [PADDED_TOP * GROUP])
    places = smallest(costs, picks, NUM_TOP, PADDED_TOP * GROUP, PADDED_TOP)
    # A place counts tokens group by group; the picks of groups are gone, the groups are not.
    number = tl.arange(0, PADDED_TOP)
    is_its = (places // GROUP)[:, None] == number[None, :]
    group = tl.sum(tl.where(is_its, groups[None, :], 0), 1)
    return group * GROUP + places % GROUP


@triton.jit(do_not_specialize=["num_heads", "depth"])
def _top_tokens_kernel(
    tokens,  # out [R, out_width] int64
    log_probs,  # out [R, out_width] float32
    counters,  # in-place [R * num_heads] int32, 0 on entry and on return
    maxima,  # scratch [R * num_heads, num_groups] int32
    sums,  # scratch [R * num_heads, num_chunks, 2] float32
    picks,  # scratch [R * num_heads, MAX_TOP] int32
    logits,  # in [R, num_heads, vocab_size]
    weights,  # in [num_heads] float32, or None
    token_map,  # in [1 or num_heads, vocab_size] int64, or None
    columns,  # in [num_heads, NUM_TOP] int32, columns of `tokens`, or None: all, in this order
    seeds,  # in [S] int64, or None: no noise, and the next three are not read
    temperatures,  # in [S] float32
    lengths,  # in [S] int32
    slots,  # in [R] int64 or int32
    depth,  # of the first head's nodes
    spread,
    out_width,
    req_stride,
    head_stride,
    map_stride,  # 0: one map for all heads
    vocab_size,
    num_groups,
    num_heads,
    DEPTH_STEP: tl.constexpr,
    NUM_TOP: tl.constexpr,
    MAX_TOP: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
    PADDED_TOP: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_CHUNKS: tl.constexpr,
):
    """Grid: (R * num_heads * chunks,), a chunk being GROUPS_PER_PROGRAM groups.

    As in ``draft_tree``: every program writes what it found in its chunk, and the one that
    finishes a row of logits last puts the row together.
    """
    num_chunks = tl.cdiv(num_groups, GROUPS_PER_PROGRAM)
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    req, head = row // num_heads, row % num_heads
    row_logits = logits + req.to(tl.int64) * req_stride + head.to(tl.int64) * head_stride
    row_maxima = maxima + row.to(tl.int64) * num_groups
    row_sums = sums + row.to(tl.int64) * num_chunks * 2
    first = chunk * GROUPS_PER_PROGRAM
    groups = first + tl.arange(0, GROUPS_PER_PROGRAM)
    values = known(load_groups(row_logits, groups, first, vocab_size, GROUP, GROUPS_PER_PROGRAM))
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    row_map = None
    if token_map is not None:
        row_map = token_map + head.to(tl.int64) * map_stride
    own_depth = depth + head * DEPTH_STEP
    hash_state, temperature = load_draw(seeds, temperatures, lengths, slots, req, own_depth)
    is_token = ids < vocab_size
    values = with_noise(values, ids, is_token, row_map, hash_state, temperature, spread)
    group_maxima = tl.max(values, 1)
    tl.store(row_maxima + groups, sortable(group_maxima), mask=groups < num_groups)
    largest = _finite(tl.max(group_maxima, 0))
    shares = tl.where(ids < vocab_size, tl.exp(_finite(values) - largest), 0.0)
    tl.store(row_sums + chunk * 2, largest)
    tl.store(row_sums + chunk * 2 + 1, tl.sum(tl.sum(shares, 1), 0))
    # As in draft_tree: everything is written before one thread announces it.
    tl.debug_barrier()
    num_done = tl.atomic_add(counters + row, 1, sem="acq_rel") + 1
    if num_done < num_chunks:
        return
    tl.store(counters + row, 0)

    chunks = tl.arange(0, PADDED_CHUNKS)
    is_chunk = chunks < num_chunks
    found = row_sums + chunks * 2
    chunk_maxima = tl.load(found, mask=is_chunk, other=-_LARGEST, cache_modifier=".cg")
    chunk_sums = tl.load(found + 1, mask=is_chunk, other=0.0, cache_modifier=".cg")
    largest = tl.max(chunk_maxima, 0)
    log_sum = tl.log(tl.sum(chunk_sums * tl.exp(chunk_maxima - largest), 0))
    best = _best_tokens(
        row_logits, row_maxima, picks + row.to(tl.int64) * MAX_TOP, row_map, hash_state,
        temperature, spread, vocab_size, num_groups, NUM_TOP, GROUP, PADDED_TOP, PADDED_GROUPS,
    )  # fmt: skip
    is_rank = tl.arange(0, PADDED_TOP) < NUM_TOP
    values = known(tl.load(row_logits + best, mask=is_rank, other=float("-inf")))
    values = with_noise(values, best, is_rank, row_map, hash_state, temperature, spread)
    ranks = ranks_of(tl.where(is_rank, descending(sortable(values)), _NEVER), PADDED_TOP)
    # Not above 0 whatever the rounding: no child is then likelier than its parent.
    values = tl.minimum((_finite(values) - largest) - log_sum, 0.0)
    if weights is not None:
        values *= tl.load(weights + head)
    if row_map is not None:
        best = tl.load(row_map + best, mask=is_rank, other=-1).to(tl.int32)
    place = head * NUM_TOP + ranks
    if columns is not None:
        place = tl.load(columns + place, mask=is_rank, other=-1)
        is_rank = place >= 0
    place += req.to(tl.int64) * out_width
    tl.store(tokens + place, best.to(tl.int64), mask=is_rank)
    tl.store(log_probs + place, values, mask=is_rank)


def top_tokens(
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    logits: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    token_map: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    noise: DrawNoise | None = None,
    workspace: DraftWorkspace | None = None,
) -> None:
    """Each head's most likely tokens, best first, with their log probabilities.

    Among equal logits the lower id comes first; NaN counts as -inf.  Infinities count as
    float32's largest numbers, so a row of nothing else is uniform over them.

    Parameters
    ----------
    tokens : torch.Tensor
        ``[>= R, K, T]`` int64, out, contiguous. Ids of the base vocabulary; T <= 128.  With
        `columns` ``[>= R, W]``.
    log_probs : torch.Tensor
        Like `tokens`, float32, out, contiguous. Log softmax over the heads' vocabulary; never
        above 0, never rising with the rank, -inf at worst.  Times `weights`.
    logits : torch.Tensor
        ``[R, K, V]`` bfloat16, float16 or float32, any strides but a dense last dimension; the
        heads' vocabulary, V <= 524288.
    weights : torch.Tensor, optional
        ``[K]`` float32, positive. Factor of each head's log probabilities.
    token_map : torch.Tensor, optional
        ``[1 or K, V]`` int64. Heads' vocabulary id -> base vocabulary id.
    columns : torch.Tensor, optional
        ``[K, T]`` int32, contiguous, below W. Column of `tokens` and `log_probs` for each rank of
        each head; where it is negative the rank is not written, nor is any other column.
    noise : DrawNoise, optional
        Added to the logits of requests that have a temperature; log probabilities are then those
        of being drawn, by heads that err as much as its spread says.
    workspace : DraftWorkspace, optional
        Serves any number of calls, one after another; allocated when missing.

    Examples
    --------
    Logits ``[[[0, 2, 0]]]``, T = 2: tokens ``[[[1, 0]]]``, log probabilities
    ``[[[-0.24, -2.24]]]``.
    """
    check_top_tokens(
        tokens, log_probs, logits, weights=weights, token_map=token_map, columns=columns,
        noise=noise, workspace=workspace,
    )  # fmt: skip
    check_runnable("logits", logits, _top_tokens_kernel)
    num_reqs, num_heads, vocab = logits.shape
    if num_reqs == 0:
        return
    num_rows, groups = num_reqs * num_heads, num_groups(vocab)
    per_program, num_warps = groups_and_warps(num_rows, vocab, _MOST_GROUPS)
    chunks = triton.cdiv(groups, per_program)
    num_top = (tokens if columns is None else columns).shape[-1]
    workspace = workspace or DraftWorkspace.allocate(num_rows, vocab, logits.device)
    drawn, depth_step = arguments_of(noise)
    _top_tokens_kernel[(num_rows * chunks,)](
        tokens, log_probs, *workspace, logits, weights, token_map, columns, *drawn,
        tokens.stride(0), logits.stride(0), logits.stride(1),
        0 if token_map is None or token_map.shape[0] == 1 else token_map.stride(0),
        vocab, groups, num_heads, DEPTH_STEP=depth_step, NUM_TOP=num_top,
        MAX_TOP=MAX_TOP, GROUP=GROUP, GROUPS_PER_PROGRAM=per_program,
        PADDED_TOP=triton.next_power_of_2(num_top),
        PADDED_GROUPS=triton.next_power_of_2(groups),
        PADDED_CHUNKS=triton.next_power_of_2(chunks), num_warps=num_warps,
    )  # fmt: skip
