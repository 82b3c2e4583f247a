"""Fall-backs and random numbers against their definitions, in plain Python."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from vllm_medusa.cpu_kernels import gumbel, murmur3, philox
from vllm_medusa.cpu_kernels.num_nans import num_nans_kernel
from vllm_medusa.cpu_kernels.raw_memory import int32_memory
from vllm_medusa.cpu_kernels.token_spans import span_offsets

WORD = 0xFFFFFFFF
KEYS = [(0, 0, 0), (-1, 1 << 40, 7), (2**63 - 1, 5, 128_255), (-(2**63), 0, 1), (12_345, 77, 31)]


def murmur3_words(words: list[int], state: int = 0) -> int:
    """MurmurHash3 (x86, 32 bits) of whole words, as published."""
    for word in words:
        key = word * 0xCC9E2D51 & WORD
        key = (key << 15 | key >> 17) & WORD
        state ^= key * 0x1B873593 & WORD
        state = (state << 13 | state >> 19) & WORD
        state = (state * 5 + 0xE6546B64) & WORD
    state ^= 4 * len(words)
    state ^= state >> 16
    state = state * 0x85EBCA6B & WORD
    state ^= state >> 13
    state = state * 0xC2B2AE35 & WORD
    return state ^ state >> 16


@pytest.mark.parametrize(("seed", "position", "token"), KEYS)
def test_murmur3_is_the_published_hash(seed: int, position: int, token: int) -> None:
    expected = murmur3_words([seed & WORD, seed >> 32 & WORD, position & WORD, token])
    rows = murmur3.row_hashes(np.array([seed]), np.array([position]))
    hashed = murmur3.token_hashes(rows, murmur3.scrambled_token_ids(token + 1)[token:])
    assert hashed.dtype == np.uint32
    assert hashed.tolist() == [expected]


def test_uniform32_is_the_rounded_midpoint() -> None:
    hashes = np.array([0, 1, 2**16, 2**31, 2**32 - 1, 0xDEADBEEF], dtype=np.uint32)
    expected = [np.float32((h + 0.5) / 2**32) for h in hashes.tolist()]
    assert murmur3.uniform32(hashes).tolist() == expected


def test_uniform64_stays_below_one() -> None:
    top = np.array([2**32 - 1], dtype=np.uint32)
    assert murmur3.uniform64(top, top)[0] < 1.0
    low, high = np.array([5], np.uint32), np.array([9], np.uint32)
    assert murmur3.uniform64(low, high)[0] == ((9 << 32 | 5) >> 11) * 2.0**-53 + 2.0**-54


@pytest.mark.parametrize(
    "logits_of",
    [
        pytest.param(lambda x: 3 * x, id="like a language model"),
        pytest.param(lambda x: 0 * x, id="all equal"),
        pytest.param(lambda x: np.round(x), id="many ties"),
        pytest.param(lambda x: 40 * x, id="one token far ahead"),
        pytest.param(lambda x: x + np.float32(3e4), id="offset that eats precision"),
        pytest.param(lambda x: np.where(x > 2, x, -np.inf), id="few tokens left"),
        pytest.param(lambda x: np.full_like(x, -np.inf), id="no token left"),
    ],
)
def test_skipping_hopeless_tokens_changes_nothing(logits_of) -> None:
    """The sampled token is the argmax over the noise of all tokens."""
    rng = np.random.default_rng(7)
    rows, vocab = 60, 3001
    logits = logits_of(rng.normal(size=(rows, vocab)).astype(np.float32)).astype(np.float32)
    seeds = rng.integers(-(2**63), 2**63, rows)
    positions = rng.integers(0, 4096, rows)
    values, tokens = gumbel.gumbel_argmax(
        logits,
        np.ones(rows, np.float32),
        seeds,
        positions,
        apply_temperature=False,
        use_fp64=False,
    )
    hashes = murmur3.row_hashes(seeds, positions)[:, None]
    noised = logits + gumbel._noise32(
        murmur3.token_hashes(hashes, murmur3.scrambled_token_ids(vocab))
    )
    assert tokens.tolist() == noised.argmax(axis=1).tolist()
    assert values.tolist() == noised.max(axis=1).tolist()


def philox_first_word(key: int, counter: int) -> int:
    """First word of Philox 4x32-10, as published."""
    c = [counter & WORD, counter >> 32 & WORD, 0, 0]
    k = [key & WORD, key >> 32 & WORD]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & WORD, a >> 32 ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c[0]


def test_philox_known_answers() -> None:
    # Random123's kat_vectors: philox4x32 10, counter and key all zeros or all ones.
    assert philox_first_word(0, 0) == 0x6627E8D5


@pytest.mark.parametrize(("seed", "offset", "_token"), KEYS)
def test_philox_uniform(seed: int, offset: int, _token: int) -> None:
    word = philox_first_word(seed % 2**64, offset)
    magnitude = WORD - word if word >= 2**31 else word
    step = np.float32(4.6566127342e-10)
    expected = max(np.float32(magnitude) * step, step)
    assert philox.positive_uniform32(np.array([seed]), np.array([offset])).tolist() == [expected]


@pytest.mark.parametrize("lengths", [[], [0], [1], [3, 0, 2], [0, 0, 5], [1, 1, 1]])
def test_span_offsets(lengths: list[int]) -> None:
    expected = [place for length in lengths for place in range(length)]
    assert span_offsets(np.array(lengths, dtype=np.int32)).tolist() == expected


def test_int32_memory_is_the_tensor_itself() -> None:
    tensor = torch.arange(6, dtype=torch.int32)
    view = int32_memory(tensor.data_ptr())
    assert view[:6].tolist() == list(range(6))
    view[2] = 9
    assert tensor.tolist() == [0, 1, 9, 3, 4, 5]


def test_num_nans() -> None:
    logits = torch.tensor([[1.0, math.nan, math.nan, 9.0], [math.inf, -math.inf, 0.0, math.nan]])
    counts = torch.full((2,), 7, dtype=torch.int32)
    # The last column lies beyond the vocabulary.
    num_nans_kernel(logits, logits.stride(0), counts, 3, BLOCK_SIZE=8192)
    assert counts.tolist() == [2, 0]


TOP_K_TOP_P = """
import torch
from vllm_medusa.cpu_kernels.topk_topp import apply_top_k_top_p_triton as top

def kept(k=None, p=None):
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 2)
    masked = top(logits, k and torch.tensor(k, dtype=torch.int32), p and torch.tensor(p))
    return [(row > float("-inf")).nonzero().flatten().tolist() for row in masked]

# Probabilities 0.03, 0.64, 0.09, 0.24.
assert kept(k=[1, 4]) == [[1], [0, 1, 2, 3]]
assert kept(p=[0.6, 0.9]) == [[1], [1, 2, 3]]
assert kept(k=[2, 3], p=[0.99, 0.7]) == [[1, 3], [1, 3]]
try:
    top(torch.zeros(1, 2), None, None, mask_value=0.0)
except ValueError as error:
    assert "mask_value is 0.0" in str(error)
else:
    raise AssertionError("a mask value that PyTorch's version ignores was accepted")
"""


@pytest.mark.vllm
def test_top_k_top_p() -> None:
    """In a process of its own: vLLM must not be imported in one that interprets kernels."""
    process = subprocess.run([sys.executable, "-c", TOP_K_TOP_P], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
