"""The custom ops of `linear_logprobs_and_entropy`: statistics tile by tile, then their gradient.

The logits exist one tile at a time, [block of rows, columns]. The forward keeps 16 bytes per row
and tile; the backward computes each tile again, overwrites it with its gradient and multiplies
that into the gradients of hidden and weight, the latter complete before the next tile.
"""

from typing import Any

import torch
from torch import Tensor

from r1v3.kernels import several_labels, softmax_rows
from r1v3.kernels.linear.gradients import Gradients, HiddenReduction
from r1v3.kernels.linear.head import TiledHead
from r1v3.kernels.linear.rows import SelectedRows
from r1v3.kernels.linear.statistics import RowStatistics
from r1v3.kernels.linear.tiles import blocks, tile_shape
from r1v3.kernels.reference import accumulation_dtype
from r1v3.kernels.registration import register_op


def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    reduce_hidden_grad: bool,
    row_tile: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [n] or [n, K], entropy [n], (m, log s, entropy) [n, 3], shard's bounds [2].

    n counts tokens, or entries of `rows`. reduce_hidden_grad is for the backward.
    """
    selected = SelectedRows(hidden, token_ids, loss_mask, rows)
    degrees = selected.temperature(temperature)
    head = TiledHead(
        weight, bias, hidden.dtype, degrees, vocab_size, group, row_tile, softcap=softcap
    )
    softmax_rows.check_labels(selected.token_ids, head.bounds[1])
    logprobs, entropy, saved = row_results(head, selected)
    if rows is None:
        logprobs, entropy, saved = (selected.scatter(x) for x in (logprobs, entropy, saved))
    return logprobs, entropy, saved, head.bounds


def row_results(head: TiledHead, rows: SelectedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n], or [n, K], entropy [n], (m, log s, entropy) [n, 3] of the rows."""
    statistics = RowStatistics(head, rows.token_ids)
    states = rows.states(head.states)
    block, width = tile_shape(head, rows.n)
    for columns, tile in head.tiles(width) if rows.n else ():
        for part in blocks(rows.n, block):
            statistics.add(columns, part, head.logits(states[part], columns, tile))
    return statistics.results()


def _fake_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    rows: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = token_ids.shape[0] if rows is None else rows.shape[0]
    entropy = hidden.new_empty(n, dtype=accumulation_dtype(hidden))
    bounds = hidden.new_empty(2, dtype=torch.int64)
    return entropy.new_empty(n, *token_ids.shape[1:]), entropy, entropy.new_empty(n, 3), bounds


def _linear_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor,
    bounds: Tensor,
    saved: Tensor,
    upstream: list[Tensor | None],
    needed: list[bool],
    group: str,
    reduce_hidden_grad: bool,
    row_tile: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed.

    Args:
        upstream: gradients of the log-probabilities and the entropy.
    """
    selected = SelectedRows(hidden, token_ids, loss_mask, rows)
    degrees = selected.temperature(temperature)
    head = TiledHead(weight, bias, hidden.dtype, degrees, None, group, row_tile, bounds, softcap)
    if rows is None:
        saved = saved[selected.row_index]
        upstream = [_part(x, selected.row_index) for x in upstream]
    if selected.token_ids.dim() == 2 and upstream[0] is not None:
        upstream[0] = several_labels.summed_gradients(upstream[0], selected.token_ids)
    gradients = Gradients(
        head, selected, needed,
        HiddenReduction(selected, group if reduce_hidden_grad else ""),
        (hidden.dtype, weight.dtype), hidden_at_once=False,
    )  # fmt: skip
    add_gradients(head, selected, gradients, saved, *upstream)
    return gradients.results()


def add_gradients(
    head: TiledHead,
    rows: SelectedRows,
    gradients: Gradients,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None = None,
) -> None:
    """Compute the logits of the rows again and add up what they contribute.

    Args:
        saved: [n, 3] from `row_results`.
        grad_logprobs: as in `softmax_rows.backward`; grad_entropy: [n].
    """
    states = rows.states(head.states)
    block, width = tile_shape(head, rows.n)
    for columns, tile in head.tiles(width) if rows.n else ():
        for part in blocks(rows.n, block):
            logits = head.logits(states[part], columns, tile)
            labels = head.labels(rows.token_ids[part], columns, part)
            softmax_rows.backward(
                logits, logits, labels, saved[part], _part(grad_logprobs, part),
                _part(grad_entropy, part),
            )  # fmt: skip
            gradients.add(columns, tile, part, logits, states[part])


def _part(vector: Tensor | None, part: slice | Tensor) -> Tensor | None:
    return None if vector is None else vector[part]


def _fake_linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needed = rest[7]
    bias_like = weight if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if needed[0] else (0,)),
        weight.new_empty(weight.shape if needed[1] else (0,)),
        bias_like.new_empty(weight.shape[:1] if needed[2] else (0,)),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, temperature, _ = inputs[:8]
    ctx.options = inputs[8:]
    _, _, saved, bounds = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, temperature, bounds, saved)


@torch.autograd.function.once_differentiable
def _backward(ctx, grad_logprobs, grad_entropy, _saved, _bounds):  # type: ignore[no-untyped-def]
    needed = list(ctx.needs_input_grad[:3])
    rest = (None,) * 9
    if (grad_logprobs is None and grad_entropy is None) or not any(needed):
        return None, None, None, *rest
    *tensors, temperature, bounds, saved = ctx.saved_tensors
    gradients = linear_gradient_op(
        *tensors, temperature, bounds, saved, [grad_logprobs, grad_entropy],
        needed, *ctx.options,
    )  # fmt: skip
    return *(g if own else None for g, own in zip(gradients, needed, strict=True)), *rest


linear_gradient_op = register_op(
    "linear_gradient", _linear_gradient, fake=_fake_linear_gradient, reads_on_host=True
)
linear_logprobs_op = register_op(
    "linear_logprobs_and_entropy", _linear_logprobs, fake=_fake_linear_logprobs,
    backward=_backward, setup_context=_save, reads_on_host=True,
)  # fmt: skip
