"""What lies between the products of sequential heads: their inputs, and their residual layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_runnable
from .checks_sequential import check_add_update, check_embed_paths

# Far below any embedding's mean square; keeps that of a row of zeros from dividing.
_EPSILON: tl.constexpr = tl.constexpr(1e-20)
# Columns of a row for each program of an update: eight bfloat16, 16 bytes, for each of its threads.
_BLOCK = 1024


@triton.jit(do_not_specialize=["num_parents", "depth"])
def _embed_paths_kernel(
    out,  # out [R * num_parents, 1 + depth, SIZE]
    hidden,  # in [R, SIZE]
    tokens,  # in [>= R, W] int64
    root_tokens,  # in [R] int64
    paths,  # in [num_parents, depth] int64, columns of `tokens`, negative: the root
    embeddings,  # in [V, SIZE]
    hidden_stride,
    tokens_stride,
    embeddings_stride,
    num_parents,
    depth,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
):
    """Grid: (R * num_parents, 1 + depth). One program owns one vector of `out`."""
    row, part = tl.program_id(0), tl.program_id(1)
    req, parent = row // num_parents, row % num_parents
    columns = tl.arange(0, PADDED_SIZE)
    is_column = columns < SIZE
    target = out + (row.to(tl.int64) * (1 + depth) + part) * SIZE + columns
    if part == 0:
        state = tl.load(hidden + req.to(tl.int64) * hidden_stride + columns, mask=is_column)
        tl.store(target, state, mask=is_column)
        return
    place = tl.load(paths + parent * depth + part - 1)
    is_drafted = place >= 0
    token = tl.load(
        tokens + req.to(tl.int64) * tokens_stride + tl.maximum(place, 0), mask=is_drafted, other=0
    )
    token = tl.where(is_drafted, token, tl.load(root_tokens + req))
    source = embeddings + tl.maximum(token, 0) * embeddings_stride + columns
    values = tl.load(source, mask=is_column, other=0.0).to(out.dtype.element_ty).to(tl.float32)
    mean = tl.sum(values * values, 0) / SIZE
    tl.store(target, values * tl.rsqrt(mean + _EPSILON), mask=is_column)


def embed_paths(
    out: torch.Tensor,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    root_tokens: torch.Tensor,
    paths: torch.Tensor,
    embeddings: torch.Tensor,
) -> None:
    """What a sequential head reads at each parent: the hidden state and its path's embeddings.

    Embeddings are scaled to a mean square of 1, see :mod:`vllm_medusa.heads_path`.

    Parameters
    ----------
    out : torch.Tensor
        ``[R * P, 1 + D, H]``, dtype of `hidden`, out, contiguous. For each request its parents,
        for each parent the hidden state, then the embeddings from the root's token on.
    hidden : torch.Tensor
        ``[R, H]`` bfloat16, float16 or float32, H <= 32768.
    tokens : torch.Tensor
        ``[>= R, W]`` int64. Tokens drafted so far; a negative one counts as 0.
    root_tokens : torch.Tensor
        ``[R]`` int64. Token of each request's root; a negative one counts as 0.
    paths : torch.Tensor
        ``[P, D]`` int64, contiguous. Parent -> columns of `tokens` from the root to the parent;
        a negative one is the root.
    embeddings : torch.Tensor
        ``[V, H]`` bfloat16, float16 or float32. Cast to the dtype of `hidden` first.

    Examples
    --------
    One request with the root token 2 and one parent, the root (paths ``[[-1]]``): with hidden
    state ``[5, 7]`` and embedding ``[3, 3]`` of token 2, out is ``[[[5, 7], [1, 1]]]``.
    """
    check_embed_paths(out, hidden, tokens, root_tokens, paths, embeddings)
    check_runnable("hidden", hidden, _embed_paths_kernel)
    (num_parents, depth), size = paths.shape, hidden.shape[1]
    if out.shape[0] == 0:
        return
    _embed_paths_kernel[(out.shape[0], depth + 1)](
        out, hidden, tokens, root_tokens, paths, embeddings,
        hidden.stride(0), tokens.stride(0), embeddings.stride(0), num_parents, depth,
        SIZE=size, PADDED_SIZE=triton.next_power_of_2(size), num_warps=8 if size > 2048 else 4,
    )  # fmt: skip


@triton.jit
def _add_update_kernel(
    out,  # out [N, SIZE], may be `states`
    states,  # in [N, SIZE]
    update,  # in [N, SIZE]
    bias,  # in [SIZE], or None
    out_stride,
    states_stride,
    update_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (N, cdiv(SIZE, BLOCK)). One program owns BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < SIZE
    values = tl.load(update + row * update_stride + columns, mask=is_column).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + columns, mask=is_column).to(tl.float32)
    values *= tl.sigmoid(values)
    values += tl.load(states + row * states_stride + columns, mask=is_column).to(tl.float32)
    tl.store(out + row * out_stride + columns, values, mask=is_column)


def add_update(
    out: torch.Tensor,
    states: torch.Tensor,
    update: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """End of a residual layer (paper, section 2.1.1): ``out = states + SiLU(update + bias)``.

    Computed in float32, rounded once.

    Parameters
    ----------
    out : torch.Tensor
        ``[N, H]``, dtype of `states`, out; may be `states` itself.
    states : torch.Tensor
        ``[N, H]`` bfloat16, float16 or float32. The layer's input.
    update : torch.Tensor
        ``[N, H]``, dtype of `states`. Its product with the layer's matrix.
    bias : torch.Tensor, optional
        ``[H]``, dtype of `states`.

    Examples
    --------
    States ``[[1, 2]]``, update ``[[0, 100]]``: out is ``[[1, 102]]``.
    """
    check_add_update(out, states, update, bias)
    check_runnable("states", states, _add_update_kernel)
    num_rows, size = states.shape
    if states.numel() == 0:
        return
    _add_update_kernel[(num_rows, triton.cdiv(size, _BLOCK))](
        out, states, update, bias, out.stride(0), states.stride(0), update.stride(0),
        SIZE=size, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
