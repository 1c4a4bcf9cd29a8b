"""The custom ops of `linear_logprobs_and_entropy`: statistics tile by tile, then their gradient.

The logits exist one tile at a time, [block of rows, columns]. The forward keeps 16 bytes per row
and tile; the backward computes each tile again, overwrites it with its gradient and multiplies
that into the gradients of hidden and weight, the latter complete before the next tile.
"""

import torch
from torch import Tensor

from r1v3.kernels import linear_rows, reference, softmax_rows
from r1v3.kernels.linear_gradients import Gradients
from r1v3.kernels.linear_parallel import HiddenReduction
from r1v3.kernels.linear_products import Head
from r1v3.kernels.linear_statistics import RowStatistics, shifted, vocabulary_bounds


@torch.library.custom_op("r1v3::linear_logprobs_and_entropy", mutates_args=())
def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    rows: Tensor | None,
    weight_grad_accumulator: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    row_tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropy [n], (m, log s, entropy) [n, 3], the shard's bounds [2].

    n counts tokens, or entries of `rows`. weight_grad_accumulator and reduce_hidden_grad are for
    the backward.
    """
    head = Head(weight, bias, hidden.dtype, row_tile)
    batch = linear_rows.Batch(hidden, token_ids, loss_mask, rows, group, sequence_parallel)
    bounds = vocabulary_bounds(weight, vocab_size, group)
    logprobs, entropy, saved = row_results(
        head, batch, float(temperature), bounds, group, persistent=False
    )
    if rows is None:
        logprobs, entropy, saved = (batch.spread(x) for x in (logprobs, entropy, saved))
    return logprobs, entropy, saved, bounds


def row_results(
    head: Head,
    batch: linear_rows.Batch,
    temperature: float,
    bounds: Tensor,
    group: str,
    *,
    persistent: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropy [n], (m, log s, entropy) [n, 3] of the batch's rows.

    `persistent` is the choice between two forwards: the one kernel of `linear_forward_triton`,
    which must support the head, or products of tiles and a row kernel over each. The op takes the
    tiles. The benchmark runs both, and is what decides: the other one is to be deleted.
    """
    statistics = RowStatistics(batch.token_ids, temperature, bounds, group)
    if persistent and batch.n:
        from r1v3.kernels import linear_forward_triton

        stats = linear_forward_triton.row_statistics(
            batch.states(head.weight.dtype), head.weight, head.bias, batch.token_ids, temperature,
            bounds,
        )  # fmt: skip
        statistics.add_whole(stats)
        return statistics.results()
    states = batch.states(head.states)
    block, width = linear_rows.tile_shape(head, batch.n)
    for columns, tile in head.tiles(width) if batch.n else ():
        for part in linear_rows.blocks(batch.n, block):
            logits = head.logits(states[part], columns, tile)
            statistics.add(columns, part, logits)
    return statistics.results()


@linear_logprobs_and_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    rows: Tensor | None,
    weight_grad_accumulator: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    row_tile: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = token_ids.shape[0] if rows is None else rows.shape[0]
    logprobs = hidden.new_empty(n, dtype=reference.accumulation_dtype(hidden))
    bounds = hidden.new_empty(2, dtype=torch.int64)
    return logprobs, torch.empty_like(logprobs), logprobs.new_empty(n, 3), bounds


@torch.library.custom_op("r1v3::linear_gradient", mutates_args=("weight_grad_accumulator",))
def linear_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    rows: Tensor | None,
    weight_grad_accumulator: Tensor | None,
    temperature: Tensor,
    bounds: Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    group: str,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    row_tile: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed.

    With weight_grad_accumulator, the weight's gradient is added to it and returned empty.
    """
    head = Head(weight, bias, hidden.dtype, row_tile)
    batch = linear_rows.Batch(hidden, token_ids, loss_mask, rows, group, sequence_parallel)
    if rows is None:
        saved = saved[batch.picked]
        grad_logprobs, grad_entropy = (
            _part(x, batch.picked) for x in (grad_logprobs, grad_entropy)
        )
    reduction = HiddenReduction(
        group if reduce_hidden_grad else "", batch.total, None if batch.whole else batch.picked,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    gradients = Gradients(
        head, batch.n, needed, weight_grad_accumulator, reduction, hidden_at_once=False,
        hidden_dtype=hidden.dtype, weight_dtype=weight.dtype,
    )  # fmt: skip
    add_gradients(
        head, batch, gradients, float(temperature), bounds, saved, grad_logprobs, grad_entropy
    )
    return gradients.results()


def add_gradients(
    head: Head,
    batch: linear_rows.Batch,
    gradients: Gradients,
    temperature: float,
    bounds: Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Computes the logits of the batch's rows again and adds up what they contribute.

    Args:
        saved: [n, 3] from `row_results`; grad_logprobs, grad_entropy: [n].
    """
    states = batch.states(head.states)
    block, width = linear_rows.tile_shape(head, batch.n)
    for columns, tile in head.tiles(width) if batch.n else ():
        shard = shifted(bounds, columns.start)
        for part in linear_rows.blocks(batch.n, block):
            logits = head.logits(states[part], columns, tile)
            softmax_rows.backward(
                logits, logits, batch.token_ids[part], None, temperature, None, shard,
                saved[part], _part(grad_logprobs, part), _part(grad_entropy, part),
            )  # fmt: skip
            gradients.add(columns, tile, part, logits, states[part])


def _part(vector: Tensor | None, part: slice | Tensor) -> Tensor | None:
    return None if vector is None else vector[part]


@linear_gradient.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    rows: Tensor | None,
    weight_grad_accumulator: Tensor | None,
    temperature: Tensor,
    bounds: Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    group: str,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    row_tile: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    bias_like = weight if bias is None else bias
    own_weight = needed[1] and weight_grad_accumulator is None
    return (
        hidden.new_empty(hidden.shape if needed[0] else (0,)),
        weight.new_empty(weight.shape if own_weight else (0,)),
        bias_like.new_empty(weight.shape[:1] if needed[2] else (0,)),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.accumulator, temperature, _, group, parallel, reduce, row_tile = inputs
    _, _, saved, bounds = output
    ctx.options = group, parallel, reduce, row_tile
    ctx.set_materialize_grads(False)
    # The accumulator is not saved: that would forbid adding to it between forward and backward.
    ctx.save_for_backward(*tensors, temperature, bounds, saved)


def _backward(ctx, grad_logprobs, grad_entropy, _saved, _bounds):  # type: ignore[no-untyped-def]
    needed = list(ctx.needs_input_grad[:3])
    rest = (None,) * 10
    if (grad_logprobs is None and grad_entropy is None) or not any(needed):
        return None, None, None, *rest
    *tensors, temperature, bounds, saved = ctx.saved_tensors
    gradients = linear_gradient(
        *tensors, ctx.accumulator, temperature, bounds, saved, grad_logprobs, grad_entropy,
        *ctx.options, needed,
    )  # fmt: skip
    returned = needed[0], needed[1] and ctx.accumulator is None, needed[2]
    return *(g if own else None for g, own in zip(gradients, returned, strict=True)), *rest


linear_logprobs_and_entropy.register_autograd(_backward, setup_context=_save)
