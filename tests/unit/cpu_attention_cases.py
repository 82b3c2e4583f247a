"""A paged CPU cache filled by vLLM's own operation, and what attention over it must give."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm._custom_ops")

from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

if current_platform.is_cpu():
    current_platform.import_kernels()

Tree = tuple[int, ...]  # row -> parent row, -1 at the root


def ancestor_masks(parents: Tree) -> list[int]:
    """Bit j of number i: row j is row i or an ancestor of it."""
    masks: list[int] = []
    for row, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << row)
    return masks


def words_of(mask: int) -> list[int]:
    """Two int64 with the bits of a mask, the lower ones first."""
    words = [mask & (1 << 64) - 1, mask >> 64]
    return [word - (1 << 64) if word >> 63 else word for word in words]


def random_tree(rng: np.random.Generator, num_rows: int) -> Tree:
    """A tree whose rows come after their parents."""
    return (-1, *(int(rng.integers(0, row)) for row in range(1, num_rows)))


def chain(num_rows: int) -> Tree:
    """A tree without branches: plain causal rows."""
    return tuple(range(-1, num_rows - 1))


@dataclass(frozen=True)
class Heads:
    """Shape and dtype of one attention layer."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_size: int = 64
    dtype: torch.dtype = torch.float32


class Layer(Attention):
    """What the CPU backend reads of vLLM's attention layer."""

    def __init__(self, impl):
        torch.nn.Module.__init__(self)
        self.impl = impl
        self._k_scale_float = self._v_scale_float = 1.0


class Setup:
    """One layer and its builder for stock or tree attention, without an engine."""

    def __init__(
        self, backend, heads: Heads, block_size: int, monkeypatch, quantization=None, **impl_options
    ):
        model = SimpleNamespace(dtype=heads.dtype, quantization=quantization)
        config = SimpleNamespace(
            model_config=model,
            parallel_config=None,
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )
        monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
        options = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
        self.impl = backend.get_impl_cls()(
            heads.num_heads,
            heads.head_size,
            heads.head_size**-0.5,
            heads.num_kv_heads,
            **(options | impl_options),
        )
        self.layer = Layer(self.impl)
        config.compilation_config = SimpleNamespace(static_forward_context={"layer": self.layer})
        spec = FullAttentionSpec(
            block_size=block_size,
            num_kv_heads=heads.num_kv_heads,
            head_size=heads.head_size,
            dtype=heads.dtype,
        )
        self.builder = backend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))

    def attend(self, batch: Batch, poison: float = 7.0) -> torch.Tensor:
        """Write the batch's keys and values, then attend; [num_tokens, num_heads, head_size]."""
        metadata = self.builder.build(0, batch.common())
        self.impl.do_kv_cache_update(self.layer, batch.key, batch.value, batch.cache, batch.slots)
        output = torch.full_like(batch.query, poison)
        query, key, value = batch.query, batch.key, batch.value
        self.impl.forward(self.layer, query, key, value, batch.cache, metadata, output)
        return output


class Batch:
    """Requests over one paged cache; the contexts are written by vLLM's own operation.

    Parameters
    ----------
    contexts, num_rows : list of int
        Keys before this step and query rows of each request.
    garbage : float
        What unused cache memory holds. NaN is the worst an earlier request can leave;
        vLLM's own kernels let it through.
    """

    def __init__(
        self,
        heads: Heads,
        block_size: int,
        contexts: list[int],
        num_rows: list[int],
        garbage: float = float("nan"),
    ):
        self.heads, self.block_size = heads, block_size
        self.contexts, self.num_rows = contexts, num_rows
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(heads.dtype)

        kv_shape = (heads.num_kv_heads, heads.head_size)
        self.keys = [
            random(context + rows, *kv_shape)
            for context, rows in zip(contexts, num_rows, strict=True)
        ]
        self.values = [random(*key.shape) for key in self.keys]
        blocks = [-(-len(key) // block_size) for key in self.keys]
        pages = torch.randperm(sum(blocks) + 2, generator=generator).int()
        self.table = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
        for row, own in zip(self.table, pages[: sum(blocks)].split(blocks), strict=True):
            row[: len(own)] = own
        width = 2 * heads.head_size
        shape = (len(pages), heads.num_kv_heads, block_size, width)
        self.cache = torch.full(shape, garbage, dtype=heads.dtype)
        self.query = random(sum(num_rows), heads.num_heads, heads.head_size)
        self.key = torch.cat([k[c:] for k, c in zip(self.keys, contexts, strict=True)])
        self.value = torch.cat([v[c:] for v, c in zip(self.values, contexts, strict=True)])
        self.slots = torch.cat(
            [
                self.slots_of(r, c, c + n)
                for r, (c, n) in enumerate(zip(contexts, num_rows, strict=True))
            ]
        )
        for r, context in enumerate(contexts):
            self.write(
                self.keys[r][:context], self.values[r][:context], self.slots_of(r, 0, context)
            )

    def slots_of(self, request: int, first: int, last: int) -> torch.Tensor:
        """Cache slots of positions first..last-1, [last - first] int64."""
        positions = torch.arange(first, last)
        pages = self.table[request][positions // self.block_size].long()
        return pages * self.block_size + positions % self.block_size

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store rows as vLLM does."""
        blocks, kv_heads, size, width = self.cache.shape
        halves = self.cache.view(blocks, kv_heads, 2 * size, width // 2).chunk(2, dim=2)
        isa = "vec" if size % 32 == 0 and self.heads.head_size % 32 == 0 else "vec16"
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)

    def common(self) -> CommonAttentionMetadata:
        """The batch as vLLM's runner describes it."""
        starts = torch.tensor([0, *np.cumsum(self.num_rows)], dtype=torch.int32)
        lens = [len(key) for key in self.keys]
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            num_reqs=len(lens),
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(self.num_rows),
            max_seq_len=max(lens),
            block_table_tensor=self.table,
            slot_mapping=self.slots,
        )

    def trees(self, trees: list[Tree]) -> SimpleNamespace:
        """The leading requests' trees as the runner binds them to the builder."""
        masks = torch.zeros(len(self.num_rows), 2, 128, dtype=torch.int64)
        for words, parents in zip(masks, trees, strict=False):
            words[:, : len(parents)] = torch.tensor([*map(words_of, ancestor_masks(parents))]).T
        if max(map(len, trees), default=0) <= 64:
            masks = masks[:, 0, :64].contiguous()
        rows = np.array([len(parents) for parents in trees], dtype=np.int32)
        return SimpleNamespace(num_tree_reqs=len(trees), num_rows_np=rows, step_masks=masks)

    def expected(
        self,
        request: int,
        parents: Tree,
        *,
        window: int | None = None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A tree request's rows by a float64 loop, [num_rows, num_heads, head_size]."""
        heads, context = self.heads, self.contexts[request]
        start = sum(self.num_rows[:request])
        keys, values = self.keys[request].double(), self.values[request].double()
        out = torch.zeros(len(parents), heads.num_heads, heads.head_size, dtype=torch.float64)
        depths = [mask.bit_count() - 1 for mask in ancestor_masks(parents)]
        for row in range(len(parents)):
            line, node = [], row
            while node >= 0:
                line.append(node)
                node = parents[node]
            position = context + depths[row]
            seen = [k for k in range(context) if window is None or position - k < window]
            seen += [
                context + n for n in line if window is None or depths[row] - depths[n] < window
            ]
            group = heads.num_heads // heads.num_kv_heads
            own_keys = keys[seen].repeat_interleave(group, 1)  # [num_seen, num_heads, head_size]
            own_values = values[seen].repeat_interleave(group, 1)
            query = self.query[start + row].double()
            scores = (own_keys * query).sum(-1) * heads.head_size**-0.5
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[None]])
            weights = torch.softmax(scores, 0)[: len(seen)]
            out[row] = (weights[..., None] * own_values).sum(0)
        return out
