"""xformers' tree attention: what it is handed, by a stand-in that obeys its documentation.

The stand-in attends as xformers' docstring says; on a GPU with xformers the same test runs on
the real one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_medusa import start_choices
from vllm_medusa.config import MedusaOptions
from vllm_medusa.start_choices import check_attention
from vllm_medusa.tree import TokenTree
from vllm_medusa.triton_kernels import reference
from vllm_medusa.xformers_attention import attend, context_mask, one_run, split_k_op, tree_bias

KV_HEADS, GROUP, SIZE, PAGE = 2, 3, 64, 64
# Small values in bfloat16: outputs up to about 3 with 8 bits, and merged from two parts.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


@dataclass
class _Lengths:
    """xformers' two descriptions of lengths in one."""

    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list
    seqlen: torch.Tensor | None = None
    seqlen_py: list | None = None
    padding: int = 0


@dataclass
class _PagedMask:
    q_seqinfo: _Lengths
    k_seqinfo: _Lengths
    block_tables: torch.Tensor
    page_size: int


class _FwOp:
    """xformers' split-K kernel beside a PyTorch that it was not compiled for."""

    @classmethod
    def not_supported_reasons(cls, d) -> list[str]:
        return ["xFormers wasn't build with CUDA support", f"{d} is too old"]


def stand_in_attention(
    q, spec_k, spec_v, cache_k, cache_v, spec_attn_bias, mask, *, prefix_op, suffix_op
):
    """Attention of ``[B, rows, G, H, D]`` over the pages that the mask names, then the tree."""
    num_reqs, rows = q.shape[:2]
    assert issubclass(prefix_op, _FwOp) and issubclass(suffix_op, _FwOp)
    assert mask.q_seqinfo.seqstart_py == [r * rows for r in range(num_reqs + 1)]
    assert mask.block_tables.shape[1] * mask.page_size == mask.k_seqinfo.padding
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for r in range(num_reqs):
        keys = torch.arange(int(mask.k_seqinfo.seqlen[r]))
        slots = mask.block_tables[r].long()[keys // mask.page_size] * mask.page_size
        slots = slots + keys % mask.page_size
        k = torch.cat([cache_k[0, slots], spec_k[r]])
        v = torch.cat([cache_v[0, slots], spec_v[r]])
        scores = torch.einsum("nghd,sghd->ghns", q[r], k) * q.shape[-1] ** -0.5
        scores[..., len(keys) :] += spec_attn_bias
        out[r] = torch.einsum("ghns,sghd->nghd", scores.softmax(-1), v)
    return out


@pytest.fixture(params=["stand-in", pytest.param("xformers", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    """Where xformers, or what stands for it, computes."""
    split_k_op.cache_clear()
    request.addfinalizer(split_k_op.cache_clear)
    if request.param == "xformers":
        pytest.importorskip("xformers", reason="xformers is not installed")
        return torch.device("cuda")
    parts = {
        "xformers": {},
        "xformers.ops": {},
        "xformers.ops.fmha": {"triton_splitk": SimpleNamespace(FwOp=_FwOp)},
        "xformers.ops.fmha.attn_bias": {
            "PagedBlockDiagonalPaddedKeysMask": _PagedMask,
            "_PaddedSeqLenInfo": _Lengths,
            "_SeqLenInfo": _Lengths,
        },
        "xformers.ops.tree_attention": {"tree_attention": stand_in_attention},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return torch.device("cpu")


@pytest.mark.parametrize(
    ("widths", "contexts"),
    [([2, 1], [1, 64, 130]), ([4, 2, 1], [63, 65]), ([4, 4, 4], [200])],
    ids=["5 rows", "21 rows", "85 rows"],
)
def test_it_attends_as_the_twin_does(device, widths, contexts):
    tree, dtype = TokenTree.from_widths(widths), torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16
    rows, num_reqs = tree.num_rows, len(contexts)
    generator = torch.Generator().manual_seed(rows)
    pages = [-(-(context + rows) // PAGE) for context in contexts]
    cache = torch.randn(sum(pages), PAGE, KV_HEADS, 2 * SIZE, generator=generator)
    order = iter(torch.randperm(sum(pages), generator=generator).tolist())
    table = torch.zeros(num_reqs, max(pages) + 1, dtype=torch.int32)
    for r, count in enumerate(pages):
        table[r, :count] = torch.tensor([next(order) for _ in range(count)])
    cache, table = cache.to(dtype).to(device), table.to(device)
    keys, values = cache.split(SIZE, -1)
    heads = torch.randn(num_reqs * rows + 2, KV_HEADS * GROUP + 1, SIZE, generator=generator)
    query = heads.to(dtype).to(device)[:, : KV_HEADS * GROUP]  # strided, as behind a projection
    positions = [torch.arange(context, context + rows) for context in contexts]
    blocks = torch.cat([table[r].cpu()[p // PAGE] for r, p in enumerate(positions)]).long()
    own_slots = torch.cat(positions) % PAGE
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=device) * rows

    out = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
    mask = context_mask(
        starts, lengths, table, rows=rows, page_size=PAGE, max_context=max(contexts) + rows
    )
    bias = tree_bias(tree, rows, dtype, device)
    attend(
        out, query, keys[blocks, own_slots], values[blocks, own_slots], keys, values, mask, bias
    )
    want = torch.empty_like(out)
    words = torch.from_numpy(tree.mask_words()).to(device)
    reference.tree_attention(
        want, query, keys, values, table, starts, lengths + rows,
        words.expand(num_reqs, *words.shape), scale=SIZE**-0.5, num_reqs=num_reqs,
        max_query_len=rows, max_seq_len=max(contexts) + rows,
    )  # fmt: skip
    used = num_reqs * rows
    assert (out - want)[:used].abs().max().item() <= TOLERANCE[dtype]
    assert out[used:].isnan().all(), "a row that belongs to nobody was written"


def test_bias_of_a_tree():
    tree = TokenTree.from_paths([[0], [0, 0], [1]])
    hidden = float("-inf")
    assert tree_bias(tree, 3, torch.float32, torch.device("cpu")).tolist() == [
        [0, hidden, hidden],
        [0, 0, hidden],
        [0, 0, 0],
    ]


def test_caches_with_gaps_or_heads_first_are_refused():
    cache = torch.zeros(3, PAGE, KV_HEADS, SIZE)
    assert one_run(cache).data_ptr() == cache.data_ptr()
    for other in (torch.zeros(3, KV_HEADS, PAGE, SIZE).transpose(1, 2), torch.zeros(
        3, 2 * PAGE, KV_HEADS, SIZE)[:, :PAGE]):  # fmt: skip
        with pytest.raises(ValueError, match='attention="xformers" over a KV cache of strides'):
            one_run(other)


def test_the_kernel_needs_no_compiled_xformers(device):
    if device.type == "cpu":
        assert split_k_op().not_supported_reasons("it") == ["it is too old"]
    else:
        from xformers.ops.fmha import triton_splitk

        assert issubclass(split_k_op(), triton_splitk.FwOp)


@pytest.mark.parametrize(
    ("is_cuda", "installed", "reason"),
    [(False, True, "NVIDIA GPU"), (True, False, r"pip install vllm-medusa\[xformers\]")],
)
def test_refused_where_it_cannot_work(monkeypatch, is_cuda, installed, reason):
    platform = SimpleNamespace(is_cuda=lambda: is_cuda)
    monkeypatch.setattr(start_choices, "current_platform", platform)
    monkeypatch.setattr(start_choices, "find_spec", lambda _: object() if installed else None)
    options = MedusaOptions("heads", attention="xformers")
    with pytest.raises(ValueError, match=f"attention='xformers': .*{reason}"):
        check_attention(options)
    check_attention(MedusaOptions("heads", attention="triton"))


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"attention='flash' must be one of triton, xformers"):
        MedusaOptions("heads", attention="flash")
