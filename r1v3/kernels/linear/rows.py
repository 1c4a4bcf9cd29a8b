"""The rows of hidden states that count, whose logits are computed."""

import torch
from torch import Tensor

from r1v3.kernels import softmax_rows
from r1v3.kernels.arguments import check_temperature, number_or_rows
from r1v3.kernels.reference import IGNORED_TOKEN
from r1v3.kernels.row_labels import part_of


class SelectedRows:
    """The rows of hidden states that count.

    Args:
        hidden: [M, H]; token_ids: [M], or [M, K] of which a row counts where one is not -100.
        loss_mask: bool [M] or None; rows: int64 [n] into M, or None.

    Attributes:
        row_index: int64 [n]; finding it is one synchronization on CUDA unless given.
        token_ids: [n], or [n, K], of those rows.
        n, total: rows that count, and all of them.
        whole: all rows count, and row_index is in order.
    """

    def __init__(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        loss_mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.total, self._hidden = token_ids.shape[0], hidden
        if rows is None:
            keep = token_ids != IGNORED_TOKEN
            if keep.dim() == 2:
                keep = keep.any(1) if keep.shape[1] else keep.new_ones(self.total)
            if loss_mask is not None:
                keep = keep & loss_mask
            self.row_index = keep.nonzero().squeeze(-1)
        else:
            if not rows.is_cuda:
                softmax_rows.check_row_index(rows, self.total)
            self.row_index = rows
        self.n = self.row_index.shape[0]
        self.whole = rows is None and self.n == self.total
        self.token_ids = token_ids[self.row_index]

    def temperature(self, temperature: Tensor) -> float | Tensor:
        """The temperature of the rows: a number, or [n].

        Args:
            temperature: 0-d, or [M].

        Raises:
            ValueError: for one of the rows' that is negative or not finite, on the CPU.
        """
        found = part_of(number_or_rows(temperature), self.row_index)
        if not self.row_index.is_cuda:
            check_temperature(found)
        return found

    def states(self, dtype: torch.dtype) -> Tensor:
        """Hidden states [n, H] of the rows."""
        return (self._hidden if self.whole else self._hidden[self.row_index]).to(dtype)

    def scatter(self, values: Tensor) -> Tensor:
        """[n, ...] of the rows to [total, ...], zero elsewhere."""
        return softmax_rows.scatter(values, self.row_index, self.total)
