"""Which rows of logits are computed, their labels, and the softmax over them."""

from typing import NamedTuple

import torch
from torch import Tensor

from r1v3.kernels import devices, vocab_parallel
from r1v3.kernels.arguments import is_zero


class RowLabels(NamedTuple):
    """Rows of logits [..., V] that are computed, their labels, and the softmax over them.

    Attributes:
        token_ids: [n] global ids of the rows or -100, [n, K] of K labels for each, or None.
        rows: int64 [n] into the flattened leading dimensions, or None for all of them.
        temperature: of all rows, or float64 [n].
        vocab_size: columns that take part, or None for all; a shard says it better.
        shard: int64 [2], id of the first column and the true vocabulary size, or empty.
        group: name of the group over which the vocabulary is sharded, or empty.
        softcap: c where the logits are c * tanh(z / c) and the gradient is that of z, or 0.
    """

    token_ids: Tensor | None
    rows: Tensor | None
    temperature: float | Tensor
    vocab_size: int | None
    shard: Tensor
    group: str = ""
    softcap: float = 0.0

    @property
    def several(self) -> bool:
        """Whether each row has K labels."""
        return self.token_ids is not None and self.token_ids.dim() == 2

    def columns(self, width: int) -> tuple[int, int, int]:
        """First token id here, number of columns that take part, and the true vocabulary size."""
        return vocab_parallel.columns(width, self.vocab_size, self.shard)

    def columns_on_device(self, width: int) -> tuple[int, Tensor | None]:
        """Columns of which a shard on the device, if there is one, takes a part: no wait."""
        if self.shard.numel():
            return width, self.shard
        return width if self.vocab_size is None else self.vocab_size, None

    def local_ids(self, first: int) -> Tensor | None:
        """int64 [n] ids counted from this shard's first one."""
        if self.token_ids is None:
            return None
        ids = self.token_ids.to(torch.int64).contiguous()
        return ids - first if first else ids

    def runs_triton(self, tensor: Tensor) -> bool:
        """Whether Triton computes them from logits or statistics like `tensor`."""
        return devices.runs_triton(tensor) and not is_zero(self.temperature)


def part_of(temperature: float | Tensor, part: slice | Tensor) -> float | Tensor:
    """The temperature of a part of its rows."""
    return temperature[part] if isinstance(temperature, Tensor) else temperature
