"""Which rows of a language head are computed, and how many rows and columns at a time.

Sizes are chosen by bytes, never by how many rows there are. They depend on free memory only in
powers of two: the shape of a product, and with it the last bits of its result, must not change
with every allocation of the process.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from r1v3.kernels import reference
from r1v3.kernels.arguments import check_rows
from r1v3.kernels.linear_parallel import gather_hidden
from r1v3.kernels.linear_products import Head, aligned

# Whole rows of logits and their gradient, for the one-pass loss: on the host 96 rows of 151,936.
# On a GPU a product of fewer than about a thousand rows is bound by reading the weight.
HOST_WORKSPACE = 56 * 2**20
SMALLEST_DEVICE_WORKSPACE = 160 * 2**20
DEVICE_WORKSPACE = 2**30
ROW_ALIGNMENT = 128
# Tiles of logits, cut into columns as well: rows of one product, and bytes.
HOST_BLOCK_ROWS = 1024
HOST_TILE = 16 * 2**20
DEVICE_BLOCK_ROWS = 8192
DEVICE_TILE = 288 * 2**20


class Batch:
    """The rows of hidden states that count.

    Args:
        hidden: [M, H], or with sequence_parallel this rank's [M / ranks, H].
        token_ids: [M]; loss_mask: bool [M] or None; rows: int64 [n] into M, or None.

    Attributes:
        picked: int64 [n], the rows; finding them is one synchronisation on CUDA unless given.
        token_ids: [n] of those rows.
        n, total: rows that count, and all of them.
        whole: all rows count, and picked is in order.
    """

    def __init__(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        loss_mask: Tensor | None,
        rows: Tensor | None,
        group: str,
        sequence_parallel: bool,
    ) -> None:
        self.total = token_ids.shape[0]
        self._gathered_by = group if sequence_parallel else ""
        if rows is None:
            keep = token_ids != reference.IGNORED_TOKEN
            if loss_mask is not None:
                keep = keep & loss_mask
            self.picked = keep.nonzero().squeeze(-1)
        else:
            _check_rows(rows, self.total)
            self.picked = rows
        self.n = self.picked.shape[0]
        self.whole = rows is None and self.n == self.total
        self._hidden = hidden
        self.token_ids = token_ids[self.picked]

    def states(self, dtype: torch.dtype) -> Tensor:
        """Hidden states [n, H] of the rows; with sequence_parallel from all ranks."""
        hidden = self._hidden
        if self._gathered_by:
            hidden = gather_hidden(hidden, self._gathered_by)
        return (hidden if self.whole else hidden[self.picked]).to(dtype)

    def spread(self, values: Tensor) -> Tensor:
        """[n, ...] of the rows to [total, ...], 0 elsewhere."""
        full = values.new_zeros(self.total, *values.shape[1:])
        return full.index_copy_(0, self.picked, values)


def blocks(n: int, size: int) -> Iterator[slice]:
    """n rows in order, at most `size` at a time."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def tile_shape(head: Head, n: int) -> tuple[int, int]:
    """Rows and columns of the tiles of n rows of logits."""
    rows = DEVICE_BLOCK_ROWS if head.weight.is_cuda else HOST_BLOCK_ROWS
    if head.row_tile:
        rows = max(rows // head.row_tile, 1) * head.row_tile
    # With a row_tile, the shape must not depend on how many rows there are.
    return rows, tile_columns(head, rows if head.row_tile else min(rows, n))


def tile_columns(head: Head, rows: int) -> int:
    """Columns of a tile of so many rows of logits."""
    cuda = head.weight.is_cuda
    logit = head.result.itemsize + (head.operand.itemsize if head.operand != head.result else 0)
    columns = (DEVICE_TILE if cuda else HOST_TILE) // (logit * max(rows, ROW_ALIGNMENT))
    return aligned(columns) if cuda else min(aligned(columns), head.tile_columns())


def chunk_rows(head: Head, n: int, vocab: int, *, copies: bool, sums: bool, shared: bool) -> int:
    """Whole rows of n at a time, in chunks of nearly equal size.

    Args:
        vocab: columns of a row.
        copies: the gradient of the logits is copied to the operands' dtype as a whole.
        sums: several chunks would need a float32 [V, H] to add up a 16-bit weight's gradient. Its
            memory is then better spent on rows, if that makes them one chunk.
        shared: the ranks of a group must choose alike, so free memory does not count.
    """
    row = head.result.itemsize + (head.operand.itemsize if copies else 0)
    most = _workspace(head.weight.device, shared=shared) // (row * max(vocab, 1))
    if sums and n <= most + head.weight.shape[1] * head.result.itemsize // row:
        return max(n, 1)
    unit = head.row_tile or ROW_ALIGNMENT
    most = most // unit * unit or head.row_tile or max(most, 1)
    even = -(-n // max(-(-n // most), 1))
    return max(min(-(-even // unit) * unit, most), 1)


def _workspace(device: torch.device, *, shared: bool) -> int:
    if device.type != "cuda":
        return HOST_WORKSPACE
    size = DEVICE_WORKSPACE
    if not shared:
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while size > free // 2 and size > SMALLEST_DEVICE_WORKSPACE:
            size //= 2
    return size


def _check_rows(rows: Tensor, n: int) -> None:
    check_rows(rows)
    if rows.is_cuda or rows.numel() == 0:
        return
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(f"rows must be in [0, {n}), got {int(rows.min())} to {int(rows.max())}")
    if rows.unique().numel() != rows.numel():
        raise ValueError(f"rows must not repeat, got {rows[:16].tolist()}")
