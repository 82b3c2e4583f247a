"""Device functions of tree attention: how keys are split, found, scored and folded in."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def popcount(words):
    """Set bits of each int64 word, int32 (one shift per bit: no intrinsic is portable)."""
    bits = (words[:, None] >> tl.arange(0, 64)[None, :].to(tl.int64)) & 1
    return tl.sum(bits.to(tl.int32), 1)


@triton.jit
def row_masks(
    masks_row,  # [W] int64, this request's words
    rows,  # [BLOCK_ROWS] int32
    is_row,  # [BLOCK_ROWS] bool
    WINDOW: tl.constexpr,
    SECOND_WORD: tl.constexpr,  # distance of a row's second word, 0: there is none
):
    """Words, second words and depths of rows; what nobody reads is not loaded."""
    words = tl.load(masks_row + rows, mask=is_row, other=1)
    high_words = words
    if SECOND_WORD > 0:
        high_words = tl.load(masks_row + SECOND_WORD + rows, mask=is_row, other=0)
    depths = tl.zeros(rows.shape, tl.int32)
    if WINDOW > 0:
        depths = popcount(words) - 1
        if SECOND_WORD > 0:
            depths += popcount(high_words)
    return words, high_words, depths


@triton.jit
def program_rows(
    query_start_loc,  # [>= num_reqs + 1] int32
    seq_lens,  # [>= num_reqs] int32
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """KV head, request, its first row, rows and keys, and the first (row, head) pair.

    Of the program in a grid ``(row_tiles, num_reqs * Hkv, ...)``; three loads are in flight
    before the first is waited for.
    """
    kv_head = tl.program_id(1) % NUM_KV_HEADS
    req = tl.program_id(1) // NUM_KV_HEADS
    start = tl.load(query_start_loc + req)
    query_len = tl.load(query_start_loc + req + 1) - start
    seq_len = tl.load(seq_lens + req)
    return kv_head, req, start, query_len, seq_len, tl.program_id(0) * BLOCK_ROWS


@triton.jit
def split_pairs(
    first_pair,
    start,
    query_len,
    kv_head,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """[BLOCK_ROWS] each of a tile's pairs: row, query head, whether it exists, int64 token."""
    pairs = first_pair + tl.arange(0, BLOCK_ROWS)
    rows = pairs // GROUP
    heads = kv_head * GROUP + pairs % GROUP
    return rows, heads, rows < query_len, (start + rows).to(tl.int64)


@triton.jit
def key_tiles(
    seq_len,
    context,
    num_splits,
    WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """First visible key, first tile, end tile and tiles per split of one request.

    Both kernels call it, so they agree on which splits are in use.  The root has depth 0
    and sees furthest back.
    """
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(context - WINDOW + 1, 0)
    first_tile = first_key // BLOCK_KEYS
    end_tile = tl.cdiv(seq_len, BLOCK_KEYS)
    per_split = tl.maximum(tl.cdiv(end_tile - first_tile, num_splits), MIN_TILES)
    return first_key, first_tile, end_tile, per_split


@triton.jit
def written_keys(low, first_key, seq_len, WINDOW: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """[BLOCK_KEYS] uint32 keys of a tile, or what stands for them.

    Keys that no row sees may lie in freed pages, and 0 * NaN would be NaN: the nearest key that
    was written stands for them.  A mask would cost a tenth of the loop's instructions.
    """
    written = tl.minimum(low + tl.arange(0, BLOCK_KEYS), seq_len - 1)
    if WINDOW > 0:
        written = tl.maximum(written, first_key)
    # Unsigned: a signed division by a power of two corrects negative numbers.
    return written.to(tl.uint32)


@triton.jit
def key_pages(
    table_row,  # [max_blocks] int32, this request's pages
    low,  # first key of the tile; behind the last tile the last page is read again
    first_key,
    seq_len,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    IN_ONE_PAGE: tl.constexpr,
):
    """Page of each key of a tile, [BLOCK_KEYS] int32; one number if all lie in one."""
    if IN_ONE_PAGE:
        pages = tl.load(table_row + tl.minimum(low, seq_len - 1) // BLOCK_SIZE)
    else:
        keys = written_keys(low, first_key, seq_len, WINDOW, BLOCK_KEYS)
        pages = tl.load(table_row + keys // BLOCK_SIZE)
    return pages


@triton.jit
def tail_visibility(
    masks_row,  # [W] int64, this request's words
    words,  # [BLOCK_ROWS] int64, the word of each row
    high_words,  # [BLOCK_ROWS] int64, its second word, if there is one
    depths,  # [BLOCK_ROWS] int32, 0 if WINDOW == 0
    keys,  # [BLOCK_KEYS] int32
    context,
    seq_len,
    WINDOW: tl.constexpr,
    SECOND_WORD: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_KEYS]: context keys as a whole, tree keys by bit (and depth)."""
    node = keys - context
    is_node = (node >= 0) & (keys < seq_len)
    if SECOND_WORD > 0:
        row_words = tl.where((node < 64)[None, :], words[:, None], high_words[:, None])
        is_ancestor = ((row_words >> (node & 63).to(tl.int64)[None, :]) & 1) != 0
    else:
        bit = tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)
        is_ancestor = ((words[:, None] >> bit[None, :]) & 1) != 0
    if WINDOW > 0:
        node_words = tl.load(masks_row + node, mask=is_node, other=1)
        node_depth = popcount(node_words) - 1
        if SECOND_WORD > 0:
            node_words = tl.load(masks_row + SECOND_WORD + node, mask=is_node, other=0)
            node_depth += popcount(node_words)
        is_ancestor = is_ancestor & (depths[:, None] - node_depth[None, :] < WINDOW)
    is_context = (node < 0)[None, :]
    if WINDOW > 0:
        is_context = is_context & (depths[:, None] - node[None, :] < WINDOW)
    return is_context | (is_ancestor & is_node[None, :])


@triton.jit
def attend_tile(
    acc,  # [BLOCK_ROWS, PADDED_HEAD] float32
    row_max,  # [BLOCK_ROWS] float32, log2 units
    row_sum,  # [BLOCK_ROWS] float32
    q_tile,  # [BLOCK_ROWS, PADDED_HEAD]
    words,  # [BLOCK_ROWS] int64
    high_words,  # [BLOCK_ROWS] int64, rows 64 and up; read if SECOND_WORD > 0
    depths,  # [BLOCK_ROWS] int32
    low,  # first key of the tile
    pages,  # [BLOCK_KEYS] int32, or one for all keys
    k_head,  # cache + this head's offset
    v_head,
    masks_row,
    first_key,
    context,
    seq_len,
    qk_scale,  # float32: softmax scale (times k_scale)
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    V_OFFSET: tl.constexpr,  # elements from a key to its value, 0: v_head says
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SECOND_WORD: tl.constexpr,
):
    """Online softmax step over one tile of keys.

    One body for the context and the tree: a second copy of it is fetched from memory anew in
    every layer, and a loop of its own for the last tile would start loading when the first ends.
    """
    keys = low + tl.arange(0, BLOCK_KEYS)
    dims = tl.arange(0, PADDED_HEAD)
    slots = written_keys(low, first_key, seq_len, WINDOW, BLOCK_KEYS) % BLOCK_SIZE
    if BLOCK_STRIDE % SLOT_STRIDE == 0 and SLOT_STRIDE >= 64:
        # Slots are counted in 32 bits, which 275 GB of them need: the one product in 64 bits takes
        # in the addition to the pointer.
        rows = pages.to(tl.uint32) * (BLOCK_STRIDE // SLOT_STRIDE) + slots
        offsets = rows.to(tl.int64) * SLOT_STRIDE
    else:
        offsets = pages.to(tl.int64) * BLOCK_STRIDE + slots.to(tl.int64) * SLOT_STRIDE
    # Keys are loaded as rows, like values, so that both share one layout of addresses.
    k_ptrs = k_head + offsets[:, None] + dims[None, :]
    if V_OFFSET > 0:
        v_ptrs = k_ptrs + V_OFFSET
    else:
        v_ptrs = v_head + offsets[:, None] + dims[None, :]
    if HEAD_SIZE < PADDED_HEAD:
        is_dim = (dims < HEAD_SIZE)[None, :]
        k = tl.load(k_ptrs, mask=is_dim, other=0.0)
        v = tl.load(v_ptrs, mask=is_dim, other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)

    scores = tl.dot(q_tile, tl.trans(k.to(q_tile.dtype)), input_precision="ieee")
    to_log2 = qk_scale * LOG2_E
    if SOFT_CAP > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); overflow to inf ends at 1 as it should.
        doubled = scores * (qk_scale * 2 * LOG2_E / SOFT_CAP)
        scores = SOFT_CAP - 2 * SOFT_CAP / (tl.exp2(doubled) + 1)
        to_log2 = LOG2_E
    if WINDOW > 0:
        # Without a branch: it would hold loads, which Triton's pipeliner cannot move.
        visible = tail_visibility(
            masks_row, words, high_words, depths, keys, context, seq_len, WINDOW, SECOND_WORD
        )
        scores = tl.where(visible, scores, float("-inf"))
    elif low + BLOCK_KEYS > context:  # holds keys of the tree
        visible = tail_visibility(
            masks_row, words, high_words, depths, keys, context, seq_len, WINDOW, SECOND_WORD
        )
        scores = tl.where(visible, scores, float("-inf"))

    # Maximum before scaling (the scale is positive): scaling and subtraction are one FMA.
    new_max = tl.maximum(row_max, tl.max(scores, 1) * to_log2)
    # A row that has seen nothing yet has maximum -inf; -inf - -inf would be NaN.
    anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * to_log2 - anchor[:, None])
    decay = tl.exp2(row_max - anchor)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(q_tile.dtype), v.to(q_tile.dtype), acc, input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def finish_rows(acc, row_max, row_sum, sinks, v_scale, heads, kv_head, SCALES: tl.constexpr):
    """Sinks, value scale and the division; rows that saw nothing become 0, not NaN."""
    if sinks is not None:
        sink = tl.load(sinks + heads).to(tl.float32) * LOG2_E
        new_max = tl.maximum(row_max, sink)
        acc = acc * tl.exp2(row_max - new_max)[:, None]
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.exp2(sink - new_max)
    if v_scale is not None:
        acc = acc * tl.load(v_scale + kv_head % SCALES)
    return acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
