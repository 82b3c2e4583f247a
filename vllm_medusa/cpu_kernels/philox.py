"""The random numbers of vLLM's rejection test: Triton's ``tl.rand`` (Philox 4x32-10)."""

import numpy as np

# Constants of Philox 4x32 (Salmon et al., SC11): round multipliers and key increments.
_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_A, _KEY_B = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_NUM_ROUNDS = 10
# Smallest positive value of `tl.rand`, and the step between values.
_STEP = np.float32(4.6566127342e-10)


def _low_high(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (word & np.uint64(0xFFFFFFFF)).astype(np.uint32), (word >> np.uint64(32)).astype(
        np.uint32
    )


def positive_uniform32(seeds: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Draw one uniform a (seed, offset) pair, the same as vLLM's ``tl_rand32``.

    Parameters
    ----------
    seeds, offsets : numpy.ndarray
        [num_draws] int64.

    Returns
    -------
    numpy.ndarray
        [num_draws] float32 in (0, 1).
    """
    key0, key1 = _low_high(seeds.view(np.uint64))
    c0, c1 = _low_high(offsets.view(np.uint64))
    c2 = c3 = np.zeros_like(c0)
    for _ in range(_NUM_ROUNDS):
        low_a, high_a = _low_high(_ROUND_A * c0)
        low_b, high_b = _low_high(_ROUND_B * c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key0, low_b, high_a ^ c3 ^ key1, low_a
        key0 = key0 + _KEY_A
        key1 = key1 + _KEY_B
    signed = c0.view(np.int32)
    uniform = np.where(signed < 0, ~signed, signed).astype(np.float32) * _STEP
    return np.maximum(uniform, _STEP)
