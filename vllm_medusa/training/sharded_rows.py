"""ShardedRows: one table of hidden states that lies in several mapped files."""

import numpy as np
import torch
from torch import Tensor


class ShardedRows:
    """[rows, hidden] over several mapped files; indexing copies rows to ``device``.

    Parameters
    ----------
    shards : list of Tensor
        [rows of the shard, hidden] each, mapped from files.
    device : torch.device or str
    """

    def __init__(self, shards: list[Tensor], device: torch.device | str) -> None:
        self.shards, self.device = shards, torch.device(device)
        self.starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self.shape = torch.Size((int(self.starts[-1]), shards[0].shape[1]))
        self.dtype = shards[0].dtype

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.shape[0]))
        rows = index.cpu()
        found = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        places = torch.from_numpy(np.searchsorted(self.starts, rows.numpy(), side="right") - 1)
        for number in places.unique().tolist():
            here = (places == number).nonzero().flatten()
            found[here] = self.shards[number][rows[here] - int(self.starts[number])]
        return found.to(self.device)
