"""Matrix products of a language head: float32 results whatever the operands, a tile at a time.

bfloat16 operands are multiplied as they are, by tensor cores or the CPU kernel, both with
float32 sums and results. A processor without such an instruction multiplies them by the float32
gradient of the logits; the CPU kernel converts what fits its cache. Where there is no kernel
16-bit weights are converted tile by tile, in a buffer of `tiles.TILE_BYTES`; float16 always is,
so that small gradients do not underflow. float64 stays float64.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from r1v3.kernels import cpu, devices, vocab_parallel
from r1v3.kernels.row_labels import RowLabels, part_of

# Elements from row to row of what is allocated here, a multiple of 128 bytes: of rows of 151,674
# most start off the 16 bytes that tensor cores load.
STRIDE_ALIGNMENT = 64


class TiledHead:
    """A language head whose logits are computed a tile at a time, and the dtypes of its products.

    Args:
        weight: [V, H], or with the name of a `group` this rank's shard; bias: [V] or None.
        bounds: as the attribute, if a head of the same weight and group knows them.
        softcap: the logits are softcap * tanh(logits / softcap), unless it is 0.

    Attributes:
        operand: dtype in which the gradient of the logits is multiplied.
        states: dtype in which hidden states are multiplied.
        result: dtype of the logits and of every accumulator.
        bounds: int64 [2] on the weight's device, id of the first row and true vocabulary size.
        row_tile: every product with rows of the batch has exactly this many of them, 0 for as
            many as there are.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        hidden_dtype: torch.dtype,
        temperature: float | Tensor,
        vocab_size: int | None = None,
        group: str = "",
        row_tile: int = 0,
        bounds: Tensor | None = None,
        softcap: float = 0.0,
    ) -> None:
        double = hidden_dtype == torch.float64
        native = weight.dtype == hidden_dtype == torch.bfloat16
        native = native and (weight.is_cuda or cpu.has_bfloat16_dot())
        self.result = torch.float64 if double else torch.float32
        self.operand = torch.bfloat16 if native else self.result
        self.weight, self.bias, self.row_tile = weight, bias, row_tile
        self.states = hidden_dtype if self._takes(hidden_dtype) else self.operand
        self.temperature, self.vocab_size, self.group = temperature, vocab_size, group
        self.softcap = softcap
        if bounds is None and group:
            width, device = weight.shape[0], weight.device
            bounds = vocab_parallel.shard_bounds(width, vocab_size, group, device)
        elif bounds is None:
            size = weight.shape[0] if vocab_size is None else vocab_size
            bounds = size * torch.arange(2, device=weight.device)
        self.bounds = bounds
        self._space = weight.new_empty(0, dtype=self.result)

    @property
    def whole_rows(self) -> bool:
        """Whether one product takes all columns: on a GPU, unless tiles are converted."""
        return self.weight.is_cuda and not self.converts

    def labels(
        self, token_ids: Tensor, columns: slice | None = None, rows: slice = slice(None)
    ) -> RowLabels:
        """These rows of logits, which start with these columns, or of all, and their labels.

        Args:
            token_ids: [n] of the rows, or [n, K].
        """
        shard = self.bounds
        if columns is not None:
            step = 1 - torch.arange(2, device=shard.device)
            shard = torch.add(shard, step, alpha=columns.start)
        temperature = part_of(self.temperature, rows)
        return RowLabels(token_ids, None, temperature, None, shard, self.group, self.softcap)

    def common_width(self) -> int:
        """Columns per rank, the same number on all ranks, since all must cut the rows alike.

        On CUDA, a group without vocab_size must be asked for it: one synchronization.
        """
        if not self.group:
            return self.weight.shape[0]
        total = int(self.bounds[1]) if self.vocab_size is None else self.vocab_size
        return -(-total // vocab_parallel.group_size(self.group))

    @property
    def converts(self) -> bool:
        """Whether a tile of the weight is copied before it is multiplied."""
        return not self._takes(self.weight.dtype)

    def _takes(self, dtype: torch.dtype) -> bool:
        """Whether operands of this dtype are multiplied as they are."""
        mixed = self.operand == torch.float32 and not self.weight.is_cuda
        return dtype == self.operand or (
            mixed and cpu.multiplies(torch.float32) and cpu.multiplies(dtype)
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

    def logits(
        self, states: Tensor, columns: slice, tile: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """states @ tile.T + bias[columns], capped, for hidden states [n, H] as operand.

        Without `out`, the result is overwritten by the next call.
        """
        if out is None:
            rows, stride = states.shape[0], padded(tile.shape[0])
            if self._space.numel() < rows * stride:
                self._space = states.new_empty(rows * stride, dtype=self.result)
            out = self._space[: rows * stride].view(rows, stride)[:, : tile.shape[0]]
        self._multiply_rows(states, tile.T, out, add=False)
        if self.bias is not None:
            out.add_(self.bias[columns])
        if self.softcap:
            _softcap_(out, self.softcap)
        return out

    def as_operand(self, gradient: Tensor) -> Tensor:
        """The gradient of logits in the dtype in which it is multiplied."""
        if gradient.dtype == self.operand:
            return gradient
        rows, columns = gradient.shape
        space = gradient.new_empty(rows, padded(columns), dtype=self.operand)
        return space[:, :columns].copy_(gradient)

    def hidden_gradient(self, gradient: Tensor, tile: Tensor, out: Tensor, *, add: bool) -> None:
        """out (+)= gradient @ tile, for the gradient of a tile's logits [n, columns] as operand."""
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
        and cpu.multiplies(a.dtype)
        and cpu.multiplies(b.dtype)
    ):
        cpu.product(a, b, out, add=add)
    elif a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif adds_in_place(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


def _softcap_(logits: Tensor, softcap: float) -> None:
    if devices.runs_triton(logits):
        from r1v3.kernels.triton import softcap as triton

        triton.softcap_(logits, softcap)
    else:
        logits.div_(softcap).tanh_().mul_(softcap)


def padded(columns: int) -> int:
    """Elements from row to row of a matrix of so many columns."""
    return -(-columns // STRIDE_ALIGNMENT) * STRIDE_ALIGNMENT


@cache
def adds_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit operands to a float32 matrix; 2.8 does not."""
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, operand, operand, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True
