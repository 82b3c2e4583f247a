"""The noise of vLLM's sampler, and logits with it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotated(word, bits: tl.constexpr):
    return (word << bits) | (word >> (32 - bits))


@triton.jit
def _mixed(state, word):
    """One round of MurmurHash3: `word` (uint32) goes into `state`."""
    word = _rotated(word * 0xCC9E2D51, 15) * 0x1B873593
    return _rotated(state ^ word, 13) * 5 + 0xE6546B64


@triton.jit
def row_hash(seed, position):
    """MurmurHash3 of all that the tokens of a row share, uint32; both are int64."""
    low_32_bits = 0xFFFFFFFF
    state = _mixed((seed ^ seed).to(tl.uint32), (seed & low_32_bits).to(tl.uint32))
    state = _mixed(state, ((seed >> 32) & low_32_bits).to(tl.uint32))
    return _mixed(state, (position & low_32_bits).to(tl.uint32))


@triton.jit
def token_hash(row_state, ids):
    """The finished hash of every token id, uint32."""
    state = _mixed(row_state, ids.to(tl.uint32)) ^ 16  # bytes hashed: seed, position, id
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit
def gumbel_noise(hashes):
    """-log(-log(1 - u)) of hashes (uint32) as numbers u between 0 and 1, float32.

    Large noise, which decides what is drawn, comes from small u; its halves become floats one by
    one, so that no bit of these is lost.
    """
    upper = (hashes >> 16).to(tl.int32).to(tl.float32)
    lower = (hashes & 0xFFFF).to(tl.int32).to(tl.float32)
    u = upper * 1.52587890625e-05 + (lower + 0.5) * 2.3283064365386963e-10
    # log(1 - u) loses a small u. Its series up to the 8th power is within 6e-7 below 1 / 4.
    series = tl.full(u.shape, 0.125, tl.float32)
    for power in tl.static_range(7, 0, -1):
        series = series * u + 1.0 / power
    direct = -tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(tl.where(u < 0.25, series * u, direct))


@triton.jit
def load_draw(seeds, temperatures, lengths, slots, req, depth):
    """What a row's draw depends on: its hash, and the temperature, 0 for none.

    A node of depth d is drawn at its parent's row, d - 1 behind the root's position.  Without
    `seeds` there is no noise.
    """
    hash_state, temperature = tl.full([], 0, tl.uint32), tl.full([], 0.0, tl.float32)
    if seeds is not None:
        slot = tl.load(slots + req).to(tl.int64)
        is_request = slot >= 0
        temperature = tl.load(temperatures + slot, mask=is_request, other=0.0)
        seed = tl.load(seeds + slot, mask=is_request, other=0)
        length = tl.load(lengths + slot, mask=is_request, other=0).to(tl.int64)
        hash_state = row_hash(seed, length - 2 + depth)
    return hash_state, temperature


@triton.jit
def with_noise(
    values,  # float32, logits of tokens `ids`
    ids,  # places in the heads' vocabulary
    is_token,  # mask
    row_map,  # [vocab_size] int64, place -> id of the base vocabulary, or None
    hash_state,
    temperature,
    spread,
):
    """Logits as the sampler would compare them, divided by `spread`; as they are without one."""
    if temperature != 0.0:
        tokens = ids if row_map is None else tl.load(row_map + ids, mask=is_token, other=0)
        values = (values / temperature + gumbel_noise(token_hash(hash_state, tokens))) / spread
    return values
