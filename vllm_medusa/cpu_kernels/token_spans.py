"""Expansion of per-request spans to one index a token, the loop of most step kernels."""

import numpy as np


def span_offsets(lengths: np.ndarray) -> np.ndarray:
    """Number the tokens of each span from 0.

    Parameters
    ----------
    lengths : numpy.ndarray
        [num_spans] integers.

    Returns
    -------
    numpy.ndarray
        [sum(lengths)] int64; lengths ``[2, 0, 3]`` give ``[0, 1, 0, 1, 2]``.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)
