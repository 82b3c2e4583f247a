"""The target's embeddings are read as a table only where its lookup does nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers import vocab_parallel_embedding as layers

from vllm_medusa.embedding_table import embedding_table

VOCAB, SIZE = 70, 12


class Table(layers.VocabParallelEmbedding):
    """vLLM's layer without its parallel state."""

    def __init__(self, weight: torch.Tensor, tp_size: int = 1):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.tp_size, self.org_vocab_size = tp_size, VOCAB

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


class LMHead(layers.ParallelLMHead):
    """An output matrix, which is a table to vLLM."""

    def __init__(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(VOCAB, SIZE), requires_grad=False)


class Target(nn.Module):
    """A model of a table and whatever it does with the rows."""

    def __init__(self, table: nn.Module | None, change=lambda rows: rows, *others: nn.Module):
        super().__init__()
        self.table, self.others = table, nn.ModuleList([LMHead(), *others])
        self.change = change

    def embed_input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return self.change(self.table(ids))


def rows(dtype: torch.dtype = torch.float32, size: int = SIZE) -> torch.Tensor:
    # vLLM pads the vocabulary.
    return torch.randn(VOCAB + 26, size).to(dtype)


def test_plain_lookups_are_tables():
    weight = rows()
    found = embedding_table(Target(Table(weight)), SIZE)
    assert found.data_ptr() == weight.data_ptr()
    assert found.shape == (VOCAB + 26, SIZE)


@pytest.mark.parametrize(
    "target",
    [
        lambda: Target(None),
        lambda: Target(Table(rows(), tp_size=2)),
        lambda: Target(Table(rows(torch.float8_e4m3fn))),
        lambda: Target(Table(rows(size=SIZE + 1))),
        lambda: Target(Table(rows()), lambda found: found * 2),
        lambda: Target(Table(rows()), lambda found: found, Table(rows())),
    ],
    ids=["none", "sharded", "quantised", "another width", "scaled", "one more"],
)
def test_everything_else_is_looked_up_by_the_model(target):
    assert embedding_table(target(), SIZE) is None


def test_quantised_layers_without_a_weight():
    table = Table(rows())
    del table.weight
    table.qweight = SimpleNamespace()
    assert embedding_table(Target(table), SIZE) is None
