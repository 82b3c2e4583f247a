"""Host-side choices of tree attention: tile sizes, KV splits, workspace; integers only."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require

MIN_KEYS_PER_SPLIT = 128  # two tiles
MAX_SPLITS = 32
# More than any plan with splits needs: those are for batches of fewer tiles than fit at once.
MOST_COUNTERS = 4096
# Pairs that a program joins: 1280 pairs, one request of 40 rows and 32 heads, make 160 programs.
JOIN_ROWS = 8
# Up to here one program on each multiprocessor is enough, beyond two hide more of the loads. One
# request of 64 rows, 32/8 heads, 1 or 2 programs: 20.1 against 20.7 us at 2048 keys, 42.1 against
# 38.5 at 8192; of 40 rows 18.1 against 21.0 at 2048.
MOST_KEYS_OF_ONE_PROGRAM = 4096
# Of a multiprocessor of compute capability 9.0; a program takes 1 KiB beside its own.
SHARED_BYTES = 228 << 10


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_from(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class AttentionPlan:
    """Launch shape of one call; a function of host integers alone, hence graph-safe.

    Attributes
    ----------
    block_rows : int
        (query row, query head) pairs of a program, M.
    block_keys : int
        Keys of one step of the loop, N.
    row_tiles : int
        Programs that share one (request, KV head, split).
    num_splits : int
        KV ranges per request; above 1 partial results are joined.
    num_warps, num_stages : int
        Triton's launch options.
    min_tiles : int
        Fewest key tiles given to one split.
    join_rows : int
        Pairs that a program of the kernel joins that follows the splits; 0: there is none, the
        last program of a tile joins its splits.
    max_registers : int or None
        Bound per thread, where the compiler's own choice would leave room for fewer programs.
    """

    block_rows: int
    block_keys: int
    row_tiles: int
    num_splits: int
    num_warps: int
    num_stages: int
    min_tiles: int
    join_rows: int = 0
    max_registers: int | None = None


def plan_attention(
    *,
    num_reqs: int,
    num_kv_heads: int,
    group: int,
    head_size: int,
    item_size: int,
    max_query_len: int,
    max_seq_len: int,
    num_multiprocessors: int,
    num_tokens: int | None = None,
    num_splits: int | None = None,
) -> AttentionPlan:
    """Choose tiles and splits for a batch.

    Parameters
    ----------
    num_reqs, max_query_len, max_seq_len : int
        Upper bounds; with CUDA graphs those of the capture.
    num_kv_heads, group, head_size, item_size : int
        KV heads, query heads per KV head, head size, bytes of a query element.
    num_multiprocessors : int
        Of the device.
    num_tokens : int, optional
        Rows of the batch, where requests may have fewer than ``max_query_len``.
    num_splits : int, optional
        Overrides the choice, down to one tile a split.

    Examples
    --------
    One request of 64 rows, 8 KV heads, groups of 4, context 8192, on 132 multiprocessors: 256 pairs
    make 4 tiles of 64, 32 programs; 264 // 32 = 8 splits put two programs on each.
    """
    pairs, num_stages = max_query_len * group, 2
    # A graph of a mixed batch must take the widest tree, but 256 requests of two rows have 8 pairs
    # each: in tiles of 256 they computed for longer than they read, 10 of a step's 33 ms.
    mean_rows = max_query_len if num_tokens is None else ceil_div(num_tokens, max(1, num_reqs))
    usual = min(pairs, mean_rows * group)
    padded_head = power_of_two_from(head_size)
    if item_size == 4:
        # fp32 products run on the FMA units and hold their operands in registers.
        most_rows, block_keys = (32, 32) if padded_head < 128 else (16, 32)
        block_keys = 16 if padded_head > 128 else block_keys
        num_warps = 8
    elif padded_head > 128:
        most_rows, block_keys, num_warps = 64, 32, 8
    else:
        most_rows, block_keys, num_warps, num_stages = 64, 64, 4, 3
        # With enough programs and no split the more rows share a pass over the keys the better:
        # 64 rows a request, 32/8 heads, 227 against 267 us with 32 requests (256 pairs), 93.4
        # against 98.6 with 8 (128 pairs, on 128 of 132 multiprocessors).
        if usual > 128 and num_reqs * num_kv_heads * ceil_div(usual, 256) >= num_multiprocessors:
            most_rows, num_warps = 256, 16
        elif usual > 64 and 10 * num_reqs * num_kv_heads * ceil_div(usual, 128) >= (
            9 * num_multiprocessors
        ):
            most_rows, num_warps = 128, 8
    block_rows = min(max(16, power_of_two_from(pairs)), most_rows)
    row_tiles = ceil_div(pairs, block_rows)
    min_tiles = 1
    if num_splits is None:
        min_tiles = ceil_div(MIN_KEYS_PER_SPLIT, block_keys)
        programs = max(1, num_reqs * num_kv_heads * row_tiles)
        shared = (block_rows + 2 * num_stages * block_keys) * padded_head * item_size + 1024
        # Programs for one multiprocessor; by their registers it holds one of 8 warps, two of 4.
        wanted = 1 if num_warps > 4 or max_seq_len <= MOST_KEYS_OF_ONE_PROGRAM else 2
        resident = min(SHARED_BYTES // shared, wanted)
        slots = num_multiprocessors * max(1, resident)
        longest = ceil_div(max_seq_len, MIN_KEYS_PER_SPLIT)
        num_splits = max(1, min(slots // programs, longest, MAX_SPLITS))
    require(num_splits >= 1, "num_splits", num_splits, "at least 1")
    return AttentionPlan(
        block_rows, block_keys, row_tiles, num_splits, num_warps, num_stages, min_tiles,
        join_rows=JOIN_ROWS if num_splits > 1 else 0,
    )  # fmt: skip


def workspace_elements(
    num_tokens: int, num_query_heads: int, head_size: int, num_splits: int
) -> int:
    """float32 elements that a call with `num_splits` > 1 needs (0 for one split).

    Per split, token and head: the accumulator, its row maximum and its row sum.
    """
    if num_splits == 1:
        return 0
    return num_splits * num_tokens * num_query_heads * (power_of_two_from(head_size) + 2)
