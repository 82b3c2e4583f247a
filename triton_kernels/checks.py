"""Argument checks shared by the launchers and their PyTorch twins; no Triton here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# One row of a token tree is one bit of its ancestor masks, which are one or two 64-bit words:
# a request has at most a root and 127 nodes.
WORD_BITS = 64
MAX_TREE_ROWS = 2 * WORD_BITS
# What models compute in.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def require(condition: bool, name: str, found: Any, expected: str) -> None:
    """Raise a ValueError naming the argument, what was found and what was expected."""
    if not condition:
        raise ValueError(f"{name}: found {found}, expected {expected}")


def at_least(size: int) -> int | None:
    """A size for :func:`check_tensor` that accepts `size` or more."""
    return -size or None


def num_words(num_rows: int) -> int:
    """Words of a mask over so many rows.

    Where it is more than one, the words are an axis behind the requests: ancestor masks are
    ``[.., 2, W]``, path masks ``[.., 2]``.
    """
    return -(-num_rows // WORD_BITS)


def word_axis(num_rows: int) -> list[int]:
    """The axis of a mask's words: none where there is only one."""
    return [] if num_rows <= WORD_BITS else [num_words(num_rows)]


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int | None],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Check rank, the given sizes (None = any, negative = at least), dtype, device, last stride.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    tensor : torch.Tensor
        The argument.
    shape : sequence of int or None
        ``[None, -4, 8]`` accepts a rank-3 tensor with at least 4 and exactly 8 in the last two.
    dtype : torch.dtype or tuple of them
        Accepted dtypes.
    device : torch.device
        Where the tensor has to be.
    """
    require(isinstance(tensor, torch.Tensor), name, type(tensor).__name__, "a torch.Tensor")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    require(tensor.dtype in dtypes, name, f"dtype {tensor.dtype}", f"one of {list(dtypes)}")
    require(tensor.device == device, name, f"device {tensor.device}", f"device {device}")
    fits = tensor.dim() == len(shape) and all(
        want is None or (size >= -want if want < 0 else size == want)
        for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        sizes = ["any" if s is None else f">= {-s}" if s < 0 else str(s) for s in shape]
        require(False, name, f"shape {list(tensor.shape)}", f"shape [{', '.join(sizes)}]")
    if tensor.dim() and tensor.shape[-1] > 1:
        require(
            tensor.stride(-1) == 1, name, f"last stride {tensor.stride(-1)}", "a last stride of 1"
        )


def check_runnable(name: str, tensor: torch.Tensor, kernel: object) -> None:
    """A compiled kernel needs GPU tensors; one made under TRITON_INTERPRET=1 takes any."""
    if tensor.device.type != "cpu":
        return
    from triton.runtime.interpreter import InterpretedFunction

    require(
        isinstance(kernel, InterpretedFunction), name, "a CPU tensor",
        "a GPU tensor; on a CPU use the twin of the same name in triton_kernels.reference",
    )  # fmt: skip


def check_scatter_tree(
    positions: torch.Tensor,
    step_masks: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    depths: torch.Tensor,
    masks: torch.Tensor,
    num_tree_reqs: int,
) -> None:
    """Raise ValueError unless the arguments are what ``scatter_tree`` documents."""
    device = positions.device
    require(num_tree_reqs >= 0, "num_tree_reqs", num_tree_reqs, "at least 0")
    check_tensor("positions", positions, shape=[None], dtype=torch.int64, device=device)
    check_tensor("depths", depths, shape=[None, None], dtype=torch.int32, device=device)
    width = depths.shape[1]
    found, expected = f"{width} columns", f"1..{MAX_TREE_ROWS} columns"
    require(1 <= width <= MAX_TREE_ROWS, "depths", found, expected)
    words = word_axis(width)
    for name, tensor, shape, dtype in (
        ("masks", masks, [depths.shape[0], *words, width], torch.int64),
        ("step_masks", step_masks, [at_least(num_tree_reqs), *words, width], torch.int64),
        ("query_start_loc", query_start_loc, [at_least(num_tree_reqs + 1)], torch.int32),
        ("cu_num_logits", cu_num_logits, [at_least(num_tree_reqs + 1)], torch.int32),
        ("idx_mapping", idx_mapping, [at_least(num_tree_reqs)], (torch.int64, torch.int32)),
    ):
        check_tensor(name, tensor, shape=shape, dtype=dtype, device=device)
    for name, tensor in (("masks", masks), ("step_masks", step_masks)) if words else ():
        check_dense_words(name, tensor, width)


def _has_axes(tensor: Any, count: int) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dim() == count


def check_dense_words(name: str, tensor: torch.Tensor, size: int) -> None:
    """Raise ValueError unless the words of a request's masks, `size` each, lie side by side."""
    found = f"strides {list(tensor.stride())}"
    require(tensor.stride(1) == size, name, found, f"dense words of {size}")


def check_compact_kv(
    layer_ptrs: torch.Tensor,
    block_table: torch.Tensor,
    idx_mapping: torch.Tensor,
    root_positions: torch.Tensor,
    path_masks: torch.Tensor,
    *,
    num_reqs: int,
    block_size: int,
    num_kv_heads: int,
    row_elems: int,
    dtype: torch.dtype,
    alignment: int | None,
) -> None:
    """Raise ValueError unless the arguments are what ``compact_kv`` documents."""
    device = layer_ptrs.device
    for name, number in (
        ("block_size", block_size), ("num_kv_heads", num_kv_heads), ("row_elems", row_elems)
    ):  # fmt: skip
        require(number >= 1, name, number, "at least 1")
    require(num_reqs >= 0, "num_reqs", num_reqs, "at least 0")
    require(dtype.itemsize in (1, 2, 4, 8), "dtype", dtype, "elements of 1, 2, 4 or 8 bytes")
    aligned = alignment in (None, 16, dtype.itemsize)
    require(aligned, "alignment", alignment, f"None, 16 or {dtype.itemsize}, the size of dtype")
    integers = (torch.int64, torch.int32)
    for name, tensor, shape, dtypes in (
        ("layer_ptrs", layer_ptrs, [None], torch.int64),
        ("block_table", block_table, [None, None], torch.int32),
        ("idx_mapping", idx_mapping, [at_least(num_reqs)], integers),
        ("root_positions", root_positions, [at_least(num_reqs)], integers),
    ):
        check_tensor(name, tensor, shape=shape, dtype=dtypes, device=device)
    shape = [at_least(num_reqs), *([2] if _has_axes(path_masks, 2) else [])]
    check_tensor("path_masks", path_masks, shape=shape, dtype=torch.int64, device=device)
    found = f"strides {list(path_masks.stride())}"
    require(path_masks.is_contiguous(), "path_masks", found, "a dense tensor")


def check_tree_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_masks: torch.Tensor,
    *,
    scale: float,
    num_reqs: int,
    max_query_len: int,
    max_seq_len: int,
    sliding_window: int,
    logit_soft_cap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q_scale: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the arguments are what ``tree_attention`` documents."""
    device, floats = q.device, (*FLOATS, torch.float64)
    dtypes = (*floats, *FLOAT8)
    check_tensor("q", q, shape=[None, None, None], dtype=dtypes, device=device)
    computed = floats if q.dtype in FLOAT8 else (q.dtype,)
    _, num_heads, head_size = q.shape
    require(16 <= head_size <= 256, "q", f"head size {head_size}", "a head size of 16..256")
    for name, tensor, accepted in (("q", q, dtypes), ("out", out, computed)):
        check_tensor(name, tensor, shape=q.shape, dtype=accepted, device=device)
        found = tensor.stride(1)
        require(found == head_size, name, f"head stride {found}", f"dense heads ({head_size})")
    cached = (out.dtype, *FLOAT8)
    cache_shape = [None, None, None, head_size]
    check_tensor("k_cache", k_cache, shape=cache_shape, dtype=cached, device=device)
    check_tensor("v_cache", v_cache, shape=k_cache.shape, dtype=k_cache.dtype, device=device)
    strides = v_cache.stride(), k_cache.stride()
    require(strides[0] == strides[1], "v_cache", f"strides {strides[0]}", f"{strides[1]}")
    kv_heads = k_cache.shape[2]
    divides = kv_heads > 0 and num_heads % kv_heads == 0
    require(divides, "k_cache", f"{kv_heads} heads", f"a divisor of q's {num_heads} heads")
    for name, number, low in (
        ("num_reqs", num_reqs, 0), ("max_query_len", max_query_len, 1),
        ("max_seq_len", max_seq_len, 0), ("sliding_window", sliding_window, 0),
        ("logit_soft_cap", logit_soft_cap, 0),
    ):  # fmt: skip
        require(number >= low, name, number, f"at least {low}")
    require(scale > 0, "scale", scale, "a positive number")
    words = [2] if _has_axes(tree_masks, 3) else []
    most = MAX_TREE_ROWS if words else WORD_BITS
    expected = f"at most {most}" + ("" if words else "; masks of more rows are [.., 2, W]")
    require(max_query_len <= most, "max_query_len", max_query_len, expected)
    mask_shape = [at_least(num_reqs), *words, at_least(max_query_len)]
    for name, tensor, shape, dtype in (
        ("block_table", block_table, [at_least(num_reqs), None], torch.int32),
        ("query_start_loc", query_start_loc, [at_least(num_reqs + 1)], torch.int32),
        ("seq_lens", seq_lens, [at_least(num_reqs)], torch.int32),
        ("tree_masks", tree_masks, mask_shape, torch.int64),
    ):
        check_tensor(name, tensor, shape=shape, dtype=dtype, device=device)
    if sinks is not None:
        check_tensor("sinks", sinks, shape=[num_heads], dtype=floats, device=device)
    counts = {1, kv_heads}
    for name, factors in (("k_scale", k_scale), ("v_scale", v_scale), ("q_scale", q_scale)):
        if factors is not None:
            shape = [None] * factors.dim()
            check_tensor(name, factors, shape=shape, dtype=torch.float32, device=device)
            found, expected = f"{factors.numel()} elements", " or ".join(map(str, sorted(counts)))
            require(factors.numel() in counts, name, found, expected)
            counts = {factors.numel()}  # one stride serves them all
