"""The custom ops of `linear_grpo_loss`: log-probabilities and gradients in one pass over the head.

What a token's loss is divided by is known before the pass, and the rest of its gradient depends
on no other token. So, a chunk of rows at a time: logits, row statistics, d loss / d logprob, the
gradient of the logits in their place, its two products. Nothing is computed twice, but for
16-bit weights on the host: see `_two_passes`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from r1v3.kernels import linear_rows, softmax_rows
from r1v3.kernels.linear_gradients import Gradients
from r1v3.kernels.linear_logprobs import add_gradients, row_results
from r1v3.kernels.linear_parallel import HiddenReduction, group_size
from r1v3.kernels.linear_products import Head, padded
from r1v3.kernels.linear_statistics import (
    RowStatistics,
    check_token_ids_on_host,
    shifted,
    vocabulary_bounds,
)
from r1v3.kernels.linear_tokens import slope_of_tokens
from r1v3.kernels.reference import accumulation_dtype
from r1v3.kernels.scale import scale_


@dataclass(frozen=True)
class TokenLoss:
    """The loss of every selected token, from its log-probability alone.

    Tensors are [n]; `share` is what a token's loss counts in the total.
    """

    share: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    weights: Tensor | None
    options: tuple[float, float, float, float, int]

    def slope(self, rows: slice, logprobs: Tensor) -> Tensor:
        """d loss / d logprob of these rows."""
        old, ref, weights = (
            None if x is None else x[rows]
            for x in (self.old_logprobs, self.ref_logprobs, self.weights)
        )
        return slope_of_tokens(
            logprobs, torch.ones_like(logprobs, dtype=torch.bool), self.share[rows],
            self.advantages[rows], old, ref, weights, self.options,
        )  # fmt: skip


@torch.library.custom_op("r1v3::linear_grpo", mutates_args=("weight_grad_accumulator",))
def linear_grpo(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor,
    rows: Tensor | None,
    share: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    weight_grad_accumulator: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    row_tile: int,
    needed: list[bool],
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [N], entropy [N], gradients of hidden and weight, empty where not needed.

    Args:
        share, advantages, old_logprobs, ref_logprobs, weights: [N], per token.
        needed: whether hidden and weight get a gradient.
    """
    head = Head(weight, None, hidden.dtype, row_tile)
    batch = linear_rows.Batch(hidden, token_ids, loss_mask, rows, group, sequence_parallel)
    reduction = HiddenReduction(
        group if reduce_hidden_grad else "", batch.total, None if batch.whole else batch.picked,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    gradients = Gradients(
        head, batch.n, [*needed, False], weight_grad_accumulator, reduction,
        hidden_at_once=_whole_rows(head), hidden_dtype=saved_dtype(hidden),
        weight_dtype=saved_dtype(weight),
    )  # fmt: skip
    old, ref, own = (
        None if x is None else x[batch.picked] for x in (old_logprobs, ref_logprobs, weights)
    )
    options = clip_low, clip_high, dual_clip, kl_coef, kl
    loss = TokenLoss(share[batch.picked], advantages[batch.picked], old, ref, own, options)
    bounds = vocabulary_bounds(weight, vocab_size, group)
    check_token_ids_on_host(batch.token_ids, bounds)
    logprobs, entropy = _add_up(
        head, batch, loss, gradients, float(temperature), vocab_size, bounds, group
    )
    return batch.spread(logprobs), batch.spread(entropy), *gradients.results()[:2]


def _add_up(
    head: Head,
    batch: linear_rows.Batch,
    loss: TokenLoss,
    gradients: Gradients,
    temperature: float,
    vocab_size: int | None,
    bounds: Tensor,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy of the batch's rows; the gradients are added up."""
    whole = _whole_rows(head)
    tiled = not whole and not head.weight.is_cuda
    weight = gradients.weight
    sums = weight is not None and weight.sums
    # With a row_tile the order of the work must not depend on how many rows there are.
    if tiled and weight is not None and weight.can_hold(batch.n) and not head.row_tile:
        return _columns_by_columns(head, batch, loss, gradients, temperature, bounds, group)
    size = linear_rows.chunk_rows(
        head, batch.n, _common_width(head.weight.shape[0], vocab_size, bounds, group),
        copies=whole and head.operand != head.result, sums=sums and not tiled, shared=bool(group),
    )  # fmt: skip
    if tiled and sums and (size < batch.n or head.row_tile):
        return _two_passes(head, batch, loss, gradients, temperature, bounds, group)
    return _rows_by_rows(head, batch, size, loss, gradients, temperature, vocab_size, bounds, group)


def _columns_by_columns(
    head: Head,
    batch: linear_rows.Batch,
    loss: TokenLoss,
    gradients: Gradients,
    temperature: float,
    bounds: Tensor,
    group: str,
) -> tuple[Tensor, Tensor]:
    """All rows at once, a tile of columns at a time.

    The tile's logits wait for their rows' statistics in the memory of the weight's gradient for
    its columns, which is written after their last use.
    """
    assert gradients.weight is not None
    states, rows = batch.states(head.states), slice(0, batch.n)
    width = linear_rows.tile_columns(head, batch.n)
    statistics = RowStatistics(batch.token_ids, temperature, bounds, group)
    for columns, tile in head.tiles(width) if batch.n else ():
        logits = gradients.weight.memory(columns, batch.n)
        statistics.add(columns, rows, head.logits(states, columns, tile, logits))
    logprobs, entropy, saved = statistics.results()
    slope = loss.slope(rows, logprobs)
    space = states.new_empty(batch.n, width, dtype=head.result)
    for columns, tile in head.tiles(width) if batch.n else ():
        logits = gradients.weight.memory(columns, batch.n)
        gradient = space[:, : logits.shape[1]]
        softmax_rows.backward(
            logits, gradient, batch.token_ids, None, temperature, None,
            shifted(bounds, columns.start), saved, slope, None,
        )  # fmt: skip
        gradients.add(columns, tile, rows, gradient, states)
    return logprobs, entropy


def _rows_by_rows(
    head: Head,
    batch: linear_rows.Batch,
    size: int,
    loss: TokenLoss,
    gradients: Gradients,
    temperature: float,
    vocab_size: int | None,
    bounds: Tensor,
    group: str,
) -> tuple[Tensor, Tensor]:
    """`size` rows of logits at a time."""
    states = batch.states(head.states)
    logprobs = states.new_zeros(batch.n, dtype=head.result)
    entropy = torch.zeros_like(logprobs)
    vocab = head.weight.shape[0]
    width = vocab if _whole_rows(head) else linear_rows.tile_shape(head, size)[1]
    space = states.new_empty(min(size, batch.n), padded(vocab), dtype=head.result)[:, :vocab]
    for rows in linear_rows.blocks(batch.n, size):
        chunk, ids = states[rows], batch.token_ids[rows]
        logits = space[: chunk.shape[0]]
        for columns, tile in head.tiles(width):
            head.logits(chunk, columns, tile, logits[:, columns])
        logprobs[rows], entropy[rows], saved, _ = softmax_rows.forward(
            logits, ids, None, temperature, None if group else vocab_size, group, bounds
        )
        softmax_rows.backward(
            logits, logits, ids, None, temperature, None, bounds, saved,
            loss.slope(rows, logprobs[rows]), None,
        )  # fmt: skip
        for columns, tile in head.tiles(width):
            gradients.add(columns, tile, rows, logits[:, columns], chunk)
    return logprobs, entropy


def _two_passes(
    head: Head,
    batch: linear_rows.Batch,
    loss: TokenLoss,
    gradients: Gradients,
    temperature: float,
    bounds: Tensor,
    group: str,
) -> tuple[Tensor, Tensor]:
    """A tile of the logits at a time, and all of them once more for the gradients.

    The gradient of a tile's weight is complete before the next tile. Rows in chunks would need a
    float32 sum for all of a 16-bit weight, which is twice the memory of its gradient.
    """
    logprobs, entropy, saved = row_results(
        head, batch, temperature, bounds, group, persistent=False
    )
    slope = loss.slope(slice(0, batch.n), logprobs)
    add_gradients(head, batch, gradients, temperature, bounds, saved, slope, None)
    return logprobs, entropy


def _whole_rows(head: Head) -> bool:
    """Whether one product takes all columns: on a GPU, unless the weight is converted in tiles."""
    return head.weight.is_cuda and not head.converts


def _common_width(vocab: int, vocab_size: int | None, bounds: Tensor, group: str) -> int:
    """Columns per rank, the same number on all ranks, since all must cut the rows alike.

    On CUDA, a group without vocab_size must be asked for it: one synchronisation.
    """
    if not group:
        return vocab
    total = int(bounds[1]) if vocab_size is None else vocab_size
    return -(-total // group_size(group))


def saved_dtype(tensor: Tensor) -> torch.dtype:
    """In which a gradient waits for the upstream factor: in float16 it might vanish until then."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@linear_grpo.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor,
    rows: Tensor | None,
    share: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    weight_grad_accumulator: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    row_tile: int,
    needed: list[bool],
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = hidden.new_empty(token_ids.shape[0], dtype=accumulation_dtype(hidden))
    own_weight = needed[1] and weight_grad_accumulator is None
    return (
        logprobs,
        torch.empty_like(logprobs),
        hidden.new_empty(hidden.shape if needed[0] else (0,), dtype=saved_dtype(hidden)),
        weight.new_empty(weight.shape if own_weight else (0,), dtype=saved_dtype(weight)),
    )


@torch.library.custom_op("r1v3::with_gradient", mutates_args=())
def with_gradient(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    accumulated: bool,
) -> Tensor:
    """The loss [], whose gradients by hidden and weight are known.

    They are multiplied by the upstream gradient in place, so a second backward raises.

    Args:
        grad_hidden, grad_weight: as hidden and weight; empty where they have none.
        accumulated: the weight's gradient has gone elsewhere; the upstream gradient must be 1.
    """
    return loss.clone()


@with_gradient.register_fake
def _(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    accumulated: bool,
) -> Tensor:
    return torch.empty_like(loss)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, hidden, weight, grad_hidden, grad_weight, ctx.accumulated = inputs
    ctx.like = (hidden.shape, hidden.dtype), (weight.shape, weight.dtype)
    ctx.save_for_backward(grad_hidden, grad_weight)


def _backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
    if ctx.accumulated:
        torch._assert_async(
            grad_loss == 1,
            "linear_grpo_loss with weight_grad_accumulator: the upstream gradient of the loss "
            "must be 1, as the weight's gradient is already added; use normalizer to scale",
        )
    given = []
    for gradient, (shape, dtype), wanted in zip(
        ctx.saved_tensors, ctx.like, ctx.needs_input_grad[1:3], strict=True
    ):
        if wanted and gradient.shape == shape:
            scale_(gradient, grad_loss)
            given.append(gradient.to(dtype))
        else:
            given.append(None)
    return None, *given, None, None, None


with_gradient.register_autograd(_backward, setup_context=_save)
