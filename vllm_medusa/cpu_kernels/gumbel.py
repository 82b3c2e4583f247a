"""Fall-back of the sampling kernel (``v1/worker/gpu/sample/gumbel.py``)."""

import numpy as np
import torch

from vllm_medusa.cpu_kernels import murmur3

# Added to the position of a draft's draw, so that a draft and its verification use
# independent noise (`_DRAFT_NOISE_SALT` in vLLM).
_DRAFT_NOISE_SALT = 1 << 30
# Elements of logits handled at once: 256 KiB an array keeps a pass in the L2 cache.
_CHUNK_ELEMENTS = 1 << 16
# How much a bound that decides which tokens cannot win is lowered, in absolute and in
# relative terms: more than the rounding errors of float32, less than would let many
# more tokens through.
_SLACK, _RELATIVE_SLACK = np.float32(1e-3), np.float32(1e-6)
# The bits of a positive float32, read as an integer, are 2**23 (127 + log2), less at
# most 0.09 * 2**23: a base-2 logarithm for free. This is its unit in natural logarithms.
_BITS_PER_NAT = np.float32(2**23 / np.log(2.0))
# The same of 2**32, by which hashes are larger than uniforms.
_BITS_OF_HASH_RANGE = np.float32((127 + 32) * 2**23)


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
        logits_ptr.float().numpy(),
        np.where(valid, temp_ptr.numpy()[reqs], np.float32(0.0)),
        seeds_ptr.numpy()[reqs],
        pos_ptr.numpy() + (_DRAFT_NOISE_SALT if IS_DRAFTING else 0),
        apply_temperature=APPLY_TEMPERATURE,
        use_fp64=USE_FP64,
    )
    local_max = local_max_ptr.numpy()
    local_max[:, 1:] = -np.inf
    local_max[:, 0] = values
    local_argmax_ptr.numpy()[:, 0] = tokens


def gumbel_argmax(
    logits: np.ndarray,
    temperatures: np.ndarray,
    seeds: np.ndarray,
    positions: np.ndarray,
    *,
    apply_temperature: bool,
    use_fp64: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Best logit of each row after Gumbel noise, or without noise at temperature 0.

    Parameters
    ----------
    logits : numpy.ndarray
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
    tuple of numpy.ndarray
        [num_rows] values (float64 with ``use_fp64``, else float32) and [num_rows]
        int64 tokens. Temperature 0 and logits ``[1, 3, 2]`` give 3.0 and token 1.
    """
    tokens = logits.argmax(axis=1)
    values = logits[np.arange(len(tokens)), tokens]
    if use_fp64:
        values = values.astype(np.float64)
    sampled = np.flatnonzero(temperatures)
    if len(sampled) == 0:
        return values, tokens
    row_hashes = murmur3.row_hashes(seeds, positions)
    high_hashes = murmur3.high_row_hashes(seeds, positions) if use_fp64 else None
    rows_at_once = min(len(sampled), max(1, _CHUNK_ELEMENTS // logits.shape[1]))
    # Allocated once for all chunks: fresh pages would take longer than the arithmetic.
    chunks = np.empty((rows_at_once, logits.shape[1]), np.float32)
    work = np.empty((3, *chunks.shape), np.uint32)
    for begin in range(0, len(sampled), rows_at_once):
        rows = sampled[begin : begin + rows_at_once]
        chunk = np.take(logits, rows, axis=0, out=chunks[: len(rows)], mode="clip")
        if apply_temperature:
            chunk /= temperatures[rows, None]
        if use_fp64:
            chunk = chunk + _noise64(row_hashes[rows, None], high_hashes[rows, None], chunk)
            tokens[rows] = chunk.argmax(axis=1)
            values[rows] = chunk[np.arange(len(rows)), tokens[rows]]
        else:
            values[rows], tokens[rows] = _noised_argmax32(
                chunk, tokens[rows], row_hashes[rows], work[:, : len(rows)]
            )
    return values, tokens


def _noised_argmax32(
    # [num_rows, vocab_size] float32
    logits: np.ndarray,
    # [num_rows], token of the largest logit
    best: np.ndarray,
    # [num_rows] uint32
    row_hashes: np.ndarray,
    # [3, num_rows, vocab_size] uint32, overwritten
    work: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(value, token) of the best noised logit of each row, [num_rows] each.

    The noise of uniform u is at most -log(u), so a token with log(u) above its logit
    minus a bound has no chance; the bound is the noised largest logit. That leaves about
    1 / (probability of the likeliest token) tokens to compute noise for. The logarithm
    here is a lower estimate, which only lets a few more through.
    """
    numbers = np.arange(len(logits))
    scrambled = murmur3.scrambled_token_ids(logits.shape[1])
    hashes = murmur3.token_hashes(row_hashes[:, None], scrambled, out=work[0], scratch=work[1])
    values = logits[numbers, best]
    bounds = values + _noise32(hashes[numbers, best])
    bounds -= _SLACK + _RELATIVE_SLACK * np.abs(bounds)
    reach, log_hash = work[1].view(np.float32), work[2].view(np.float32)
    np.copyto(reach, hashes, casting="unsafe")
    np.copyto(log_hash, reach.view(np.int32), casting="unsafe")
    with np.errstate(invalid="ignore"):
        # A row without finite logits gives NaN here and keeps its argmax.
        np.subtract(logits, bounds[:, None], out=reach)
    reach *= _BITS_PER_NAT
    reach += _BITS_OF_HASH_RANGE
    rows, tokens = np.divmod(np.flatnonzero(log_hash <= reach), logits.shape[1])
    if len(rows) == 0:
        return values, best
    noised = logits[rows, tokens] + _noise32(hashes[rows, tokens])
    firsts = _first_of_each(rows)
    values[rows[firsts]] = np.maximum.reduceat(noised, firsts)
    # The first of equal values wins, as in the kernel.
    winners = np.flatnonzero(noised == values[rows])
    winners = winners[_first_of_each(rows[winners])]
    winning_tokens = best.copy()
    winning_tokens[rows[winners]] = tokens[winners]
    return values, winning_tokens


def _first_of_each(ordered: np.ndarray) -> np.ndarray:
    """Index of the first of each run of equal values."""
    starts = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=starts[1:])
    return np.flatnonzero(starts)


def _noise32(hashes: np.ndarray) -> np.ndarray:
    """Gumbel noise -log(-log(1 - u)) in float32: the large values come from small u."""
    return -np.log(-_log1p_negated(murmur3.uniform32(hashes)))


def _noise64(
    row_hashes: np.ndarray, high_row_hashes: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """Gumbel noise -log(-log u) in float64 for every logit."""
    scrambled = murmur3.scrambled_token_ids(logits.shape[1])
    low = murmur3.token_hashes(row_hashes, scrambled)
    high = murmur3.token_hashes(high_row_hashes, scrambled)
    return -np.log(-np.log(murmur3.uniform64(low, high)))


def _log1p_negated(value: np.ndarray) -> np.ndarray:
    """log(1 - value) in float32: the kernel's series below 0.25, the logarithm above.

    The order of operations is the kernel's, so the bits are too.
    """
    polynomial = np.full_like(value, np.float32(1.0 / 8.0))
    for order in (7, 6, 5, 4, 3, 2, 1):
        polynomial = np.float32(1.0 / order) + value * polynomial
    series = -value * polynomial
    direct = np.log(np.maximum(np.float32(1.0) - value, np.float32(5.960464477539063e-08)))
    return np.where(value < np.float32(0.25), series, direct)
