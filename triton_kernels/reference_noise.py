"""Plain PyTorch twin of the sampler's noise; needs no Triton."""

from __future__ import annotations

import torch

from .noise_types import DrawNoise

_LOW_32_BITS = 0xFFFFFFFF


def _rotated(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _LOW_32_BITS


def _mixed(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """One round of MurmurHash3; 32 bits in int64, whose products wrap above them."""
    word = _rotated(word * 0xCC9E2D51 & _LOW_32_BITS, 15) * 0x1B873593 & _LOW_32_BITS
    return (_rotated(state ^ word, 13) * 5 + 0xE6546B64) & _LOW_32_BITS


def noise_hash(
    seeds: torch.Tensor,  # int64
    positions: torch.Tensor,  # int64
    ids: torch.Tensor,  # int64
) -> torch.Tensor:
    """MurmurHash3 of seed, position and token id, int64 below 2**32, all shapes broadcast.

    Examples
    --------
    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> hex(noise_hash(zero, zero, zero).item())
    '0x8134cdf8'
    """
    state = torch.zeros_like(seeds)
    for word in (seeds, seeds >> 32, positions, ids):
        state = _mixed(state, word & _LOW_32_BITS)
    state = state ^ 16
    state = (state ^ (state >> 16)) * 0x85EBCA6B & _LOW_32_BITS
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & _LOW_32_BITS
    return state ^ (state >> 16)


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Noise that vLLM's sampler adds to a token's logit, float32, all shapes broadcast.

    Parameters
    ----------
    seeds : torch.Tensor
        int64, seed of the request.
    positions : torch.Tensor
        int64, position of the row at which the token is drawn.
    ids : torch.Tensor
        int64, the token in the base vocabulary.
    """
    u = (noise_hash(seeds, positions, ids).double() + 0.5) * 2.0**-32
    return -(-torch.log1p(-u)).log().float()


def with_noise(
    logits: torch.Tensor,  # [R, K, V]
    token_map: torch.Tensor | None,  # [1 or K, V] int64
    noise: DrawNoise,
) -> torch.Tensor:
    """Logits as the sampler would compare them, divided by the spread, [R, K, V] float32.

    Those of requests without temperature as they are.
    """
    _, num_heads, vocab = logits.shape
    device, slots = logits.device, noise.slots.long().clamp(min=0)
    temperatures = torch.where(noise.slots >= 0, noise.temperatures[slots], 0.0)[:, None, None]
    depths = noise.depth + noise.depth_step * torch.arange(num_heads, device=device)
    # A node of depth d is drawn at its parent's row, d - 1 behind the root's position.
    positions = noise.lengths[slots].long()[:, None] - 2 + depths
    ids = torch.arange(vocab, device=device)[None] if token_map is None else token_map
    values = gumbel_noise(noise.seeds[slots][:, None, None], positions[:, :, None], ids)
    logits = logits.float()
    known = torch.where(logits.isnan(), float("-inf"), logits)
    is_drawn = temperatures != 0.0
    noisy = (known / torch.where(is_drawn, temperatures, 1.0) + values) / noise.spread
    return torch.where(is_drawn, noisy, logits)
