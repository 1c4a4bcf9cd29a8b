"""Sums of a language head's gradients: in float32, rounded once, reduced over the group."""

import torch
import torch.distributed as dist
from torch import Tensor

from r1v3.kernels import cpu
from r1v3.kernels.linear.head import TiledHead, multiply
from r1v3.kernels.linear.rows import SelectedRows
from r1v3.kernels.vocab_parallel import process_group


class WeightGradient:
    """The gradient of the weight, or of some of its rows, from any number of contributions.

    A 16-bit weight's sum is kept in float32 from its first contribution to its last.
    """

    def __init__(self, head: TiledHead, dtype: torch.dtype, *, empty: bool) -> None:
        self.head = head
        make = head.weight.new_zeros if empty else head.weight.new_empty
        self.result = make(head.weight.shape, dtype=dtype)
        if not empty:
            cpu.prefer_huge_pages(self.result)
        self._sums: dict[int, Tensor] = {}

    @property
    def sums(self) -> bool:
        """Whether contributions need memory of their own until the last one."""
        return self.result.dtype != self.head.result

    def can_hold(self, n: int) -> bool:
        """Whether the memory of some columns' gradient is enough for n rows of their logits."""
        row = self.head.weight.shape[1] * self.result.itemsize
        return n * self.head.result.itemsize <= row

    def memory(self, columns: slice, n: int) -> Tensor:
        """The same memory as these columns' gradient, for n rows of their logits: [n, columns]."""
        width, dtype = columns.stop - columns.start, self.head.result
        elements = n * width * dtype.itemsize // self.result.itemsize
        return self.result[columns].view(-1)[:elements].view(dtype).view(n, width)

    def add(
        self, columns: slice, gradient: Tensor, states: Tensor, *, first: bool, last: bool
    ) -> None:
        """Add gradient.T @ states, the first or last of the contributions to these columns."""
        transposed = gradient.T
        out = self.result[columns]
        if out.dtype == self.head.result:
            multiply(transposed, states, out, add=not first)
        elif first and last and out.dtype == transposed.dtype:
            multiply(transposed, states, out, add=False)
        else:
            shape = columns.stop - columns.start, states.shape[1]
            total = self._sums.pop(columns.start, None)
            if total is None:
                total = states.new_empty(shape, dtype=self.head.result)
            multiply(transposed, states, total, add=not first)
            if last:
                out.copy_(total)
            else:
                self._sums[columns.start] = total


class HiddenReduction:
    """Sum of the gradient of hidden over a group while the caller multiplies something else.

    Args:
        rows: which rows of hidden have a gradient.
        group: name of the process group, or empty: then nothing is summed.
    """

    def __init__(self, rows: SelectedRows, group: str) -> None:
        self.rows, self.group = rows, group
        self._pending: list[dist.Work | None] = []

    def start(self, gradient: Tensor, rows: slice) -> None:
        """Start summing these rows of the gradient [n, H]; the rows before them are complete.

        They must not be touched until `finish`.
        """
        if self.group:
            group = process_group(self.group)
            self._pending.append(dist.all_reduce(gradient[rows], group=group, async_op=True))

    def finish(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of all hidden rows in this dtype."""
        for work in self._pending:
            if work is not None:
                work.wait()
        self._pending.clear()
        gradient = gradient.to(dtype)
        return gradient if self.rows.whole else self.rows.scatter(gradient)


class Gradients:
    """Sums of the gradients of hidden, weight and bias, each only if needed.

    Args:
        needed: whether hidden, weight and bias have one.
        reduction: sums the hidden rows' gradient over the group.
        hidden_at_once: every row's gradient comes in one piece, so that its product needs no sum.
            It is float32 all the same: of few rows, a library cuts the product along the
            vocabulary, and may add the parts in the dtype of the result.
        dtypes: of the results for hidden and weight.
    """

    def __init__(
        self,
        head: TiledHead,
        rows: SelectedRows,
        needed: list[bool],
        reduction: HiddenReduction,
        dtypes: tuple[torch.dtype, torch.dtype],
        *,
        hidden_at_once: bool,
    ) -> None:
        need_hidden, need_weight, need_bias = needed
        self.head, self.n, self.reduction, self.dtype = head, rows.n, reduction, dtypes[0]
        weight = head.weight
        self.at_once = hidden_at_once and not reduction.group
        self.hidden: Tensor | None = None
        self.weight: WeightGradient | None = None
        self.bias: Tensor | None = None
        if need_hidden:
            make = weight.new_empty if self.at_once else weight.new_zeros
            self.hidden = make(self.n, weight.shape[1], dtype=head.result)
        if need_weight:
            self.weight = WeightGradient(head, dtypes[1], empty=self.n == 0)
        if need_bias:
            self.bias = weight.new_zeros(weight.shape[0], dtype=head.result)

    def add(
        self, columns: slice, tile: Tensor, rows: slice, gradient: Tensor, states: Tensor
    ) -> None:
        """Add what the gradient of a tile's logits [rows, columns] contributes.

        Hidden rows whose last column this is start on their way through the group before the
        product for the weight.
        """
        if self.bias is not None:
            self.bias[columns] += gradient.sum(0)
        gradient = self.head.as_operand(gradient)
        if self.hidden is not None:
            self.head.hidden_gradient(gradient, tile, self.hidden[rows], add=not self.at_once)
            if columns.stop == self.head.weight.shape[0]:
                self.reduction.start(self.hidden, rows)
        if self.weight is not None:
            first, last = rows.start == 0, rows.stop == self.n
            self.weight.add(columns, gradient, states, first=first, last=last)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all hidden rows, of the weight and of the bias; empty where not needed."""
        weight = self.head.weight
        hidden = weight.new_empty(0, dtype=self.dtype)
        if self.hidden is not None:
            hidden = self.reduction.finish(self.hidden, self.dtype)
        bias_like = weight if self.head.bias is None else self.head.bias
        bias = bias_like.new_empty(0) if self.bias is None else self.bias.to(bias_like.dtype)
        given = weight.new_empty(0) if self.weight is None else self.weight.result
        return hidden, given, bias
