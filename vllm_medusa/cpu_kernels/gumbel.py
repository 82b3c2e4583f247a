"""Fall-back of the sampling kernel (``v1/worker/gpu/sample/gumbel.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels import murmur3

# Added to the position of a draft's draw, so that a draft and its verification use
# independent noise (`_DRAFT_NOISE_SALT` in vLLM).
_DRAFT_NOISE_SALT = 1 << 30
# Largest minus smallest noise, rounded up: a token further than this below the best
# logit of its row cannot win. Float32: 22.87 at u = 2**-33, -2.81 at u = 1 (clamped).
# Float64: 36.74 at u = 1 - 2**-53, -3.62 at u = 2**-54.
_NOISE_RANGE_32 = 26.0
_NOISE_RANGE_64 = 41.0
# Share of tokens that may still win below which gathering them first is faster than
# drawing noise for all.
_SPARSE_SHARE = 0.5


def gumbel_sample_kernel(
    # [num_tokens, num_blocks] int64, written: winner of each block
    local_argmax_ptr: torch.Tensor,
    local_argmax_stride: int,
    # [num_tokens, num_blocks] float32 or float64, written: its value
    local_max_ptr: torch.Tensor,
    local_max_stride: int,
    # [max_num_reqs, num_cols, >= vocab_size] or None, written
    logits_cache_ptr: torch.Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    # scalar or [num_tokens] integers, or None
    logits_cache_col_ptr: torch.Tensor | None,
    # [num_tokens, vocab_size] or None
    logits_cache_source_ptr: torch.Tensor | None,
    logits_cache_source_stride: int,
    # [num_tokens, vocab_size]
    logits_ptr: torch.Tensor,
    logits_stride: int,
    # [num_tokens], row -> request index; negative: a padding row, sampled greedily
    expanded_idx_mapping_ptr: torch.Tensor,
    # [max_num_reqs] int64
    seeds_ptr: torch.Tensor,
    # [num_tokens] int64
    pos_ptr: torch.Tensor,
    # [max_num_reqs] float32
    temp_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """Sample a token a row: argmax of logits plus Gumbel noise, or of the logits at T = 0.

    The caller takes the best of the blocks, so the winner of the whole row goes to
    block 0 and the others get minus infinity.

    Examples
    --------
    Temperature 0 and logits ``[1, 3, 2]``: token 1 with value 3.
    """
    reqs = expanded_idx_mapping_ptr.numpy()
    valid = reqs >= 0
    if logits_cache_ptr is not None:
        columns = logits_cache_col_ptr.numpy()
        cached = torch.from_numpy(reqs[valid])
        column = torch.from_numpy(columns[valid]) if PER_TOKEN_COL else int(columns)
        source = logits_cache_source_ptr[torch.from_numpy(valid)]
        logits_cache_ptr[cached, column, :vocab_size] = source

    values, tokens = gumbel_argmax(
        logits_ptr.float(),
        np.where(valid, temp_ptr.numpy()[reqs], np.float32(0.0)),
        seeds_ptr.numpy()[reqs],
        pos_ptr.numpy() + (_DRAFT_NOISE_SALT if IS_DRAFTING else 0),
        apply_temperature=APPLY_TEMPERATURE,
        use_fp64=USE_FP64,
    )
    local_max_ptr.fill_(float("-inf"))
    local_argmax_ptr.zero_()
    local_max_ptr[:, 0] = values
    local_argmax_ptr[:, 0] = tokens


def gumbel_argmax(
    logits: torch.Tensor,
    temperatures: np.ndarray,
    seeds: np.ndarray,
    positions: np.ndarray,
    *,
    apply_temperature: bool,
    use_fp64: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best logit of each row after Gumbel noise, or without noise at temperature 0.

    Parameters
    ----------
    logits : torch.Tensor
        [num_rows, vocab_size] float32.
    temperatures : numpy.ndarray
        [num_rows] float32.
    seeds, positions : numpy.ndarray
        [num_rows] int64, the key of each row's noise.
    apply_temperature : bool
        Divide the logits by the temperature first.
    use_fp64 : bool
        Draw the noise in double precision.

    Returns
    -------
    tuple of torch.Tensor
        [num_rows] values (float32, or float64 with ``use_fp64`` where a row is
        sampled) and [num_rows] int64 tokens. Temperature 0 and logits ``[1, 3, 2]``
        give 3.0 and token 1.
    """
    values, tokens = torch.max(logits, dim=-1)
    sampled = np.flatnonzero(temperatures)
    if len(sampled) == 0:
        return values, tokens
    if len(sampled) == len(temperatures):
        # A slice instead of a list of all rows spares copies of the logits.
        sampled = slice(None)
    row_values, row_tokens = _noised_argmax(
        logits.numpy()[sampled],
        values.numpy()[sampled],
        temperatures[sampled] if apply_temperature else None,
        seeds[sampled],
        positions[sampled],
        use_fp64,
    )
    if use_fp64:
        values = values.double()
    values.numpy()[sampled] = row_values
    tokens.numpy()[sampled] = row_tokens
    return values, tokens


def _noised_argmax(
    # [num_rows, vocab_size] float32
    logits: np.ndarray,
    # [num_rows] float32
    row_max: np.ndarray,
    # [num_rows] float32 or None: logits are scaled already
    temperatures: np.ndarray | None,
    # [num_rows] int64
    seeds: np.ndarray,
    # [num_rows] int64
    positions: np.ndarray,
    use_fp64: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (value, token) of the best noised logit of each row, [num_rows] each."""
    if temperatures is not None:
        logits = logits / temperatures[:, None]
        row_max = row_max / temperatures
    rows, tokens = _possible_winners(logits, row_max, use_fp64)
    scrambled = murmur3.scrambled_token_ids(logits.shape[1])
    hashes = murmur3.row_hashes(seeds, positions)
    high_hashes = murmur3.high_row_hashes(seeds, positions) if use_fp64 else None
    if rows is None:
        noised = _noise(hashes[:, None], scrambled, None if not use_fp64 else high_hashes[:, None])
        noised += logits
    else:
        keys = scrambled[tokens]
        noise = _noise(hashes[rows], keys, None if not use_fp64 else high_hashes[rows])
        noised = np.full(logits.shape, -np.inf, dtype=noise.dtype)
        noised[rows, tokens] = logits[rows, tokens] + noise
    winners = noised.argmax(axis=1)
    return noised[np.arange(len(winners)), winners], winners


def _possible_winners(
    logits: np.ndarray, row_max: np.ndarray, use_fp64: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Find the tokens that noise can lift to the top; None, None when most of them can.

    After top-k or top-p only the tokens kept are left.
    """
    reach = _NOISE_RANGE_64 if use_fp64 else _NOISE_RANGE_32
    possible = logits >= (row_max - reach)[:, None]
    if np.count_nonzero(possible) > _SPARSE_SHARE * possible.size:
        return None, None
    return np.nonzero(possible)


def _noise(
    row_hash: np.ndarray, scrambled: np.ndarray, high_row_hash: np.ndarray | None
) -> np.ndarray:
    """Gumbel noise -log(-log u); float64 when a second hash is given."""
    hashed = murmur3.token_hashes(row_hash, scrambled)
    if high_row_hash is not None:
        uniform = murmur3.uniform64(hashed, murmur3.token_hashes(high_row_hash, scrambled))
        return -np.log(-np.log(uniform))
    noise = _log1p_negated(murmur3.uniform32(hashed))
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def _log1p_negated(value: np.ndarray) -> np.ndarray:
    """log(1 - value) in float32: the kernel's series below 0.25, the logarithm above.

    The order of operations is the kernel's, so the bits are too.
    """
    polynomial = np.full_like(value, np.float32(1.0 / 8.0))
    for order in (7, 6, 5, 4, 3, 2, 1):
        polynomial *= value
        polynomial += np.float32(1.0 / order)
    polynomial *= -value
    direct = np.subtract(np.float32(1.0), value)
    np.maximum(direct, np.float32(5.960464477539063e-08), out=direct)
    np.log(direct, out=direct)
    return np.where(value < np.float32(0.25), polynomial, direct)
