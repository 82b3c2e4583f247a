"""The random numbers of vLLM's sampler: MurmurHash3 of (seed, position, token).

Bit-exact twin of the device functions in ``v1/worker/gpu/sample/gumbel.py``. A draw
depends on nothing but its key, so a request samples the same tokens with any batch,
and with the kernel or with this fall-back.
"""

from functools import lru_cache

import numpy as np

# Second half of a 64-bit draw; the kernel's `domain` argument.
_HIGH_HALF_DOMAIN = 0x9E3779B9
# Bytes hashed: four 32-bit words (two of the seed, the position, the token).
_KEY_BYTES = np.uint32(16)


def _rotate_left(value: np.ndarray, shift: int) -> np.ndarray:
    return (value << np.uint32(shift)) | (value >> np.uint32(32 - shift))


def _scramble(key: np.ndarray) -> np.ndarray:
    """Scramble a word before it is mixed into the hash."""
    return _rotate_left(key * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _mix(hashed: np.ndarray, scrambled: np.ndarray) -> np.ndarray:
    return _rotate_left(hashed ^ scrambled, 13) * np.uint32(5) + np.uint32(0xE6546B64)


@lru_cache(maxsize=4)
def scrambled_token_ids(vocab_size: int) -> np.ndarray:
    """Scramble every token id once; a row's hash then needs only the last mix.

    Parameters
    ----------
    vocab_size : int
        Number of ids, counted from 0.

    Returns
    -------
    numpy.ndarray
        [vocab_size] uint32, read-only because it is shared.
    """
    table = _scramble(np.arange(vocab_size, dtype=np.uint32))
    table.flags.writeable = False
    return table


def row_hashes(seeds: np.ndarray, positions: np.ndarray, domain: int = 0) -> np.ndarray:
    """Hash the part of the key that all tokens of a row share.

    Parameters
    ----------
    seeds, positions : numpy.ndarray
        [num_rows] int64.
    domain : int
        Initial state; another value gives an independent stream.

    Returns
    -------
    numpy.ndarray
        [num_rows] uint32.
    """
    words = (seeds, seeds >> 32, positions)
    hashed = np.full(len(seeds), domain, dtype=np.uint32)
    for word in words:
        hashed = _mix(hashed, _scramble((word & 0xFFFFFFFF).astype(np.uint32)))
    return hashed


def token_hashes(
    row_hash: np.ndarray,
    scrambled: np.ndarray,
    out: np.ndarray | None = None,
    scratch: np.ndarray | None = None,
) -> np.ndarray:
    """Finish the hash with the token id.

    Parameters
    ----------
    row_hash : numpy.ndarray
        uint32 of :func:`row_hashes`, any shape that broadcasts with ``scrambled``.
    scrambled : numpy.ndarray
        uint32 entries of :func:`scrambled_token_ids`.
    out, scratch : numpy.ndarray, optional
        uint32 of the broadcast shape, overwritten. Without them arrays are allocated,
        which for a vocabulary takes longer than the arithmetic (fresh pages).

    Returns
    -------
    numpy.ndarray
        uint32, the broadcast shape. Seed 0, position 0, token 0 hash to 0x8134CDF8.
    """
    hashed = np.bitwise_xor(row_hash, scrambled, out=out)
    shifted = np.left_shift(hashed, np.uint32(13), out=scratch)
    hashed >>= np.uint32(19)
    hashed |= shifted
    hashed *= np.uint32(5)
    hashed += np.uint32(0xE6546B64)
    hashed ^= _KEY_BYTES
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        np.right_shift(hashed, np.uint32(shift), out=shifted)
        hashed ^= shifted
        hashed *= np.uint32(factor)
    np.right_shift(hashed, np.uint32(16), out=shifted)
    hashed ^= shifted
    return hashed


def uniform32(hashed: np.ndarray) -> np.ndarray:
    """Map hashes to (0, 1) in float32, with all 32 bits of resolution near 0.

    Parameters
    ----------
    hashed : numpy.ndarray
        uint32.

    Returns
    -------
    numpy.ndarray
        float32, (hash + 0.5) / 2**32; hash 0 gives 1.16e-10. Rounds to 1.0 at the top.
    """
    high = (hashed >> np.uint32(16)).astype(np.float32)
    low = (hashed & np.uint32(0xFFFF)).astype(np.float32)
    low += np.float32(0.5)
    low *= np.float32(2.3283064365386963e-10)
    high *= np.float32(1.52587890625e-05)
    high += low
    return high


def uniform64(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map a pair of hashes to (0, 1) in float64.

    Parameters
    ----------
    low, high : numpy.ndarray
        uint32 hashes of domain 0 and of :func:`high_row_hashes`.

    Returns
    -------
    numpy.ndarray
        float64 with 53 random bits, never 1.0.
    """
    random53 = ((high.astype(np.uint64) << np.uint64(32)) | low) >> np.uint64(11)
    step = 1.1102230246251565e-16
    uniform = (random53.astype(np.float64) + 0.5) * step
    return np.where(uniform == 1.0, uniform - step, uniform)


def high_row_hashes(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Row hashes of the upper half of a 64-bit draw; see :func:`row_hashes`."""
    return row_hashes(seeds, positions, _HIGH_HALF_DOMAIN)
