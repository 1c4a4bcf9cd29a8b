"""Matrix products of a language head: float32 results whatever the operands, a tile at a time.

bfloat16 operands are multiplied as they are, by tensor cores or the host kernel, both with
float32 sums and results. A processor without such an instruction multiplies them by the float32
gradient of the logits; the host kernel converts what fits its cache. Where there is no kernel
16-bit weights are converted tile by tile, in a buffer of `TILE_BYTES`; float16 always is, so that
small gradients do not underflow. float64 stays float64.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from r1v3.kernels import host

# Columns of the weight as operands: few enough to stay in a processor's cache, and enough for a
# full-speed product.
TILE_BYTES = 8 * 2**20
TILE_ALIGNMENT = 128
ROW_ALIGNMENT = 64


class Head:
    """The weight [V, H] and bias [V] of a language head, and the dtypes of its products.

    Attributes:
        operand: dtype in which the gradient of the logits is multiplied.
        states: dtype in which hidden states are multiplied.
        result: dtype of the logits and of every accumulator.
        row_tile: every product with rows of the batch has exactly this many of them, 0 for as
            many as there are.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, hidden_dtype: torch.dtype, row_tile: int
    ) -> None:
        double = hidden_dtype == torch.float64
        native = weight.dtype == hidden_dtype == torch.bfloat16
        native = native and (weight.is_cuda or host.has_bfloat16_dot())
        self.result = torch.float64 if double else torch.float32
        self.operand = torch.bfloat16 if native else self.result
        self.weight, self.bias, self.row_tile = weight, bias, row_tile
        self.states = hidden_dtype if self._takes(hidden_dtype) else self.operand
        self._space = weight.new_empty(0, dtype=self.result)

    @property
    def converts(self) -> bool:
        """Whether a tile of the weight is copied before it is multiplied."""
        return not self._takes(self.weight.dtype)

    def _takes(self, dtype: torch.dtype) -> bool:
        """Whether operands of this dtype are multiplied as they are."""
        mixed = self.operand == torch.float32 and not self.weight.is_cuda
        return dtype == self.operand or (
            mixed and host.multiplies(torch.float32) and host.multiplies(dtype)
        )

    def tiles(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the logits and the weight's rows for them, as operands.

        A converted tile is overwritten by the next one.
        """
        vocab, hidden = self.weight.shape
        buffer = None
        if self.converts:
            buffer = self.weight.new_empty(min(width, vocab), hidden, dtype=self.operand)
        for start in range(0, vocab, width):
            columns = slice(start, min(start + width, vocab))
            tile = self.weight[columns]
            yield columns, tile if buffer is None else buffer[: tile.shape[0]].copy_(tile)

    def tile_columns(self) -> int:
        """Columns of the weight that fit `TILE_BYTES` as operands."""
        return aligned(TILE_BYTES // max(self.weight.shape[1] * self.operand.itemsize, 1))

    def logits(
        self, states: Tensor, columns: slice, tile: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """states @ tile.T + bias[columns], for hidden states [n, H] as operand.

        Without `out`, the result is overwritten by the next call.
        """
        if out is None:
            rows, stride = states.shape[0], padded(tile.shape[0])
            if self._space.numel() < rows * stride:
                self._space = states.new_empty(rows * stride, dtype=self.result)
            out = self._space[: rows * stride].view(rows, stride)[:, : tile.shape[0]]
        self._multiply_rows(states, tile.T, out, add=False)
        return out if self.bias is None else out.add_(self.bias[columns])

    def as_operand(self, gradient: Tensor) -> Tensor:
        """The gradient of logits in the dtype in which it is multiplied."""
        if gradient.dtype == self.operand:
            return gradient
        rows, columns = gradient.shape
        space = gradient.new_empty(rows, padded(columns), dtype=self.operand)
        return space[:, :columns].copy_(gradient)

    def hidden_gradient(self, gradient: Tensor, tile: Tensor, out: Tensor, *, add: bool) -> None:
        """out (+)= gradient @ tile, for the gradient of a tile's logits [n, tile] as operand."""
        self._multiply_rows(gradient, tile, out, add=add)

    def _multiply_rows(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        if self.row_tile == 0:
            multiply(a, b, out, add=add)
            return
        padded = a.new_zeros(self.row_tile, a.shape[1])
        product = out.new_empty(self.row_tile, out.shape[1])
        for part, target in zip(a.split(self.row_tile), out.split(self.row_tile), strict=True):
            padded[: part.shape[0]] = part
            padded[part.shape[0] :] = 0
            multiply(padded, b, product, add=False)
            rows = product[: part.shape[0]]
            target.add_(rows) if add else target.copy_(rows)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b; out may be float32 where the operands have 16 bits."""
    if (
        out.dtype == torch.float32
        and not out.is_cuda
        and host.multiplies(a.dtype)
        and host.multiplies(b.dtype)
    ):
        host.product(a, b, out, add=add)
    elif a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _adds_in_place(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


def aligned(columns: int) -> int:
    """The largest multiple of `TILE_ALIGNMENT` up to columns, at least one."""
    return max(columns // TILE_ALIGNMENT, 1) * TILE_ALIGNMENT


def padded(columns: int) -> int:
    """Elements from row to row of a matrix that this module allocates.

    A multiple of 128 bytes: of rows of 151,674 most start off the 16 bytes that tensor cores load.
    """
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


@cache
def _adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit operands to a float32 matrix; 2.8 does not."""
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, operand, operand, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True
