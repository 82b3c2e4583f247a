"""What followed the last time: the chain that a request's own history proposes (prompt lookup)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable
from .checks_draft import check_lookup
from .lookup_types import MAX_MATCH, POSITION_BITS, LookupWorkspace

_BLOCK = 1024
# Programs that share one history. Eight read 32k tokens in four rounds each.
_MAX_PROGRAMS = 8
_NUM_WARPS = 4

_POSITION_BITS: tl.constexpr = tl.constexpr(POSITION_BITS)
_POSITIONS: tl.constexpr = tl.constexpr(2**POSITION_BITS - 1)


@triton.jit
def _longest_match(
    row,  # [max_len] int32, tokens of one request
    length,
    part,
    NUM_PROGRAMS: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Key of the best earlier end of the newest tokens in this program's blocks; 0: none.

    The number of tokens that match stands above the position, so that the largest key is the
    longest match, and the latest among equals.
    """
    newest = tl.load(row + length - 1, mask=length > 0, other=0)
    best = tl.zeros([BLOCK], tl.int32)
    start = part * BLOCK
    while start < length - 1:
        ends = start + tl.arange(0, BLOCK)
        is_alive = ends < length - 1
        is_alive = is_alive & (tl.load(row + ends, mask=is_alive, other=0) == newest)
        matched = is_alive.to(tl.int32)
        back = 1
        num_alive = tl.sum(matched, 0)
        # Few tokens are the newest one, so most blocks end here.
        while (num_alive > 0) & (back < MAX_MATCH):
            is_alive = is_alive & (ends >= back)
            wanted = tl.load(row + length - 1 - back, mask=length > back, other=0)
            found = tl.load(row + ends - back, mask=is_alive, other=0)
            is_alive = is_alive & (found == wanted)
            matched += is_alive.to(tl.int32)
            num_alive = tl.sum(is_alive.to(tl.int32), 0)
            back += 1
        best = tl.maximum(best, tl.where(matched > 0, (matched << _POSITION_BITS) | ends, 0))
        start += NUM_PROGRAMS * BLOCK
    return tl.max(best, 0)


@triton.jit
def _lookup_kernel(
    chain,  # out [R, LENGTH] int64
    matches,  # out [R] int32
    keys,  # in-place [R] int32, 0 on entry and on return
    counters,  # in-place [R] int32, 0 on entry and on return
    history,  # in [S, max_len] int32
    lengths,  # in [S] int32
    slots,  # in [R] int64, negative: no request
    history_stride,
    vocab_size,
    LENGTH: tl.constexpr,
    PADDED_LENGTH: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (R * NUM_PROGRAMS,). The program that ends a request's search last writes it down."""
    req, part = tl.program_id(0) // NUM_PROGRAMS, tl.program_id(0) % NUM_PROGRAMS
    slot = tl.load(slots + req).to(tl.int64)
    length = tl.load(lengths + slot, mask=slot >= 0, other=0)
    row = history + tl.maximum(slot, 0) * history_stride
    key = _longest_match(row, length, part, NUM_PROGRAMS, MAX_MATCH, BLOCK)
    if NUM_PROGRAMS > 1:
        tl.atomic_max(keys + req, key, sem="relaxed")
        # As in the other joined kernels: everything is written before one thread announces it.
        tl.debug_barrier()
        num_done = tl.atomic_add(counters + req, 1, sem="acq_rel") + 1
        if num_done < NUM_PROGRAMS:
            return
        tl.store(counters + req, 0)
        key = tl.atomic_xchg(keys + req, 0, sem="relaxed")
    match = key >> _POSITION_BITS
    first = (key & _POSITIONS) + 1
    # A match that ends near the newest token goes on with itself: its period is the distance.
    period = tl.maximum(length - first, 1)
    steps = tl.arange(0, PADDED_LENGTH)
    is_found = steps < tl.where(match > 0, LENGTH, 0)
    tokens = tl.load(row + first + steps % period, mask=is_found, other=-1)
    is_known = (tokens >= 0) & (tokens < vocab_size)
    is_whole = tl.sum(is_known.to(tl.int32), 0) == LENGTH
    match = tl.where(is_whole, match, 0)
    tokens = tl.where(is_whole, tokens, -1)
    tl.store(chain + req.to(tl.int64) * LENGTH + steps, tokens.to(tl.int64), mask=steps < LENGTH)
    tl.store(matches + req, match)


def lookup_chain(
    chain: torch.Tensor,
    matches: torch.Tensor,
    history: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    *,
    vocab_size: int,
    workspace: LookupWorkspace | None = None,
) -> None:
    """What followed the longest earlier occurrence of every request's newest tokens.

    Prompt lookup (Saxena 2023; vLLM's ``ngram``), with the match as long as it gets: of all
    earlier places whose last n tokens are the newest n, n up to 8, the one with the largest n,
    the latest among equals.  Where the history ends inside the continuation, this one repeats.

    Parameters
    ----------
    chain : torch.Tensor
        ``[>= R, L]`` int64, out, contiguous. The tokens behind that place; -1 without a match.
    matches : torch.Tensor
        ``[>= R]`` int32, out. n; 0 without a match.
    history : torch.Tensor
        ``[S, max_len]`` int32, max_len < 2**26. Tokens of every slot's request, prompt first.
        May be host memory that the device reads.
    lengths : torch.Tensor
        ``[S]`` int32. Tokens of it that are there.
    slots : torch.Tensor
        ``[R]`` int64 or int32. Batch row -> request slot; negative: no request, no match.
    vocab_size : int
        A continuation that holds anything but 0 .. vocab_size - 1 (what stands for an image, for
        one) counts as no match.
    workspace : LookupWorkspace, optional
        Serves any number of calls, one after another; allocated when missing.

    Examples
    --------
    History ``5 6 7 8 5 6``, L = 3: ``5 6`` came before, so the chain is ``7 8 5``, n = 2.
    """
    check_lookup(chain, matches, history, lengths, slots, vocab_size, workspace)
    check_runnable("lengths", lengths, _lookup_kernel)
    num_reqs, length = slots.shape[0], chain.shape[1]
    if num_reqs == 0:
        return
    workspace = workspace or LookupWorkspace.allocate(num_reqs, chain.device)
    num_programs = min(_MAX_PROGRAMS, triton.next_power_of_2(-(-history.shape[1] // _BLOCK)))
    _lookup_kernel[(num_reqs * num_programs,)](
        chain, matches, *workspace, history, lengths, slots, history.stride(0), vocab_size,
        LENGTH=length, PADDED_LENGTH=triton.next_power_of_2(length),
        NUM_PROGRAMS=num_programs, MAX_MATCH=MAX_MATCH, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
