"""The custom ops of `linear_grpo_loss`: log-probabilities and gradients in one pass over the head.

The factor of a token's loss in the total is known before the pass, and the rest of its gradient
depends on no other token. So, a chunk of rows at a time: logits, row statistics, d loss / d
logprob, the gradient of the logits in their place, its two products. Nothing is computed twice,
except for 16-bit weights on the CPU: see `_two_passes`.
"""

from typing import Any

import torch
from torch import Tensor

from r1v3.kernels import softmax_rows
from r1v3.kernels.grpo_terms import TokenTerms
from r1v3.kernels.linear.gradients import Gradients, HiddenReduction
from r1v3.kernels.linear.head import TiledHead, padded
from r1v3.kernels.linear.logprobs import add_gradients, row_results
from r1v3.kernels.linear.rows import SelectedRows
from r1v3.kernels.linear.statistics import RowStatistics
from r1v3.kernels.linear.tiles import blocks, chunk_rows, tile_columns, tile_shape
from r1v3.kernels.reference import accumulation_dtype
from r1v3.kernels.registration import register_op


def _linear_grpo(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_mask: Tensor,
    rows: Tensor | None,
    terms: list[Tensor | None],
    options: list[float],
    needed: list[bool],
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    reduce_hidden_grad: bool,
    row_tile: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [N], entropy [N], gradients of hidden and weight, empty where not needed.

    Args:
        terms, options: of a `TokenTerms` of all N tokens.
        needed: whether hidden and weight get a gradient.
    """
    selected = SelectedRows(hidden, token_ids, loss_mask, rows)
    degrees = selected.temperature(temperature)
    head = TiledHead(
        weight, None, hidden.dtype, degrees, vocab_size, group, row_tile, softcap=softcap
    )
    softmax_rows.check_labels(selected.token_ids, head.bounds[1])
    gradients = Gradients(
        head, selected, [*needed, False],
        HiddenReduction(selected, group if reduce_hidden_grad else ""),
        (_saved_dtype(hidden), _saved_dtype(weight)), hidden_at_once=head.whole_rows,
    )  # fmt: skip
    if any(needed):
        own_terms = TokenTerms.of_tensors(terms, options)[selected.row_index]
        logprobs, entropy = _add_up(head, selected, own_terms, gradients)
    else:
        logprobs, entropy, _ = row_results(head, selected)
    return selected.scatter(logprobs), selected.scatter(entropy), *gradients.results()[:2]


def _add_up(
    head: TiledHead, rows: SelectedRows, terms: TokenTerms, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy of the rows; the gradients are added up."""
    tiled = not head.whole_rows and not head.weight.is_cuda
    weight = gradients.weight
    sums = weight is not None and weight.sums
    # With a row_tile the order of the work must not depend on how many rows there are.
    if tiled and weight is not None and weight.can_hold(rows.n) and not head.row_tile:
        return _columns_by_columns(head, rows, terms, gradients)
    size = chunk_rows(head, rows.n, sums=sums and not tiled)
    if tiled and sums and (size < rows.n or head.row_tile):
        return _two_passes(head, rows, terms, gradients)
    return _rows_by_rows(head, rows, terms, gradients, size)


def _columns_by_columns(
    head: TiledHead, rows: SelectedRows, terms: TokenTerms, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """All rows at once, a tile of columns at a time.

    The tile's logits wait for their rows' statistics in the memory of the weight's gradient for
    its columns, which is written after their last use.
    """
    assert gradients.weight is not None
    states, every = rows.states(head.states), slice(0, rows.n)
    width = tile_columns(head, rows.n)
    statistics = RowStatistics(head, rows.token_ids)
    for columns, tile in head.tiles(width) if rows.n else ():
        logits = gradients.weight.memory(columns, rows.n)
        statistics.add(columns, every, head.logits(states, columns, tile, logits))
    logprobs, entropy, saved = statistics.results()
    grad_logprobs = terms.grad_logprobs(logprobs)
    space = states.new_empty(rows.n, width, dtype=head.result)
    for columns, tile in head.tiles(width) if rows.n else ():
        logits = gradients.weight.memory(columns, rows.n)
        gradient = space[:, : logits.shape[1]]
        labels = head.labels(rows.token_ids, columns)
        softmax_rows.backward(logits, gradient, labels, saved, grad_logprobs)
        gradients.add(columns, tile, every, gradient, states)
    return logprobs, entropy


def _rows_by_rows(
    head: TiledHead, rows: SelectedRows, terms: TokenTerms, gradients: Gradients, size: int
) -> tuple[Tensor, Tensor]:
    """`size` rows of logits at a time.

    Where the products of whole rows take another dtype, the gradient is written in it at once.
    """
    states = rows.states(head.states)
    logprobs = states.new_zeros(rows.n, dtype=head.result)
    entropy = torch.zeros_like(logprobs)
    vocab = head.weight.shape[0]
    width = vocab if head.whole_rows else tile_shape(head, size)[1]
    shape = min(size, rows.n), padded(vocab)
    space = operands = states.new_empty(shape, dtype=head.result)[:, :vocab]
    if head.whole_rows and head.operand != head.result:
        operands = states.new_empty(shape, dtype=head.operand)[:, :vocab]
    for part in blocks(rows.n, size):
        chunk, labels = states[part], head.labels(rows.token_ids[part], rows=part)
        logits, gradient = space[: chunk.shape[0]], operands[: chunk.shape[0]]
        for columns, tile in head.tiles(width):
            head.logits(chunk, columns, tile, logits[:, columns])
        logprobs[part], entropy[part], saved = softmax_rows.forward(logits, labels)
        grad_logprobs = terms[part].grad_logprobs(logprobs[part])
        softmax_rows.backward(logits, gradient, labels, saved, grad_logprobs)
        for columns, tile in head.tiles(width):
            gradients.add(columns, tile, part, gradient[:, columns], chunk)
    return logprobs, entropy


def _two_passes(
    head: TiledHead, rows: SelectedRows, terms: TokenTerms, gradients: Gradients
) -> tuple[Tensor, Tensor]:
    """A tile of the logits at a time, and all of them once more for the gradients.

    The gradient of a tile's weight is complete before the next tile. Rows in chunks would need a
    float32 sum for all of a 16-bit weight, which is twice the memory of its gradient.
    """
    logprobs, entropy, saved = row_results(head, rows)
    add_gradients(head, rows, gradients, saved, terms.grad_logprobs(logprobs))
    return logprobs, entropy


def _saved_dtype(tensor: Tensor) -> torch.dtype:
    """In which a gradient waits for the upstream factor: in float16 it might vanish until then."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _fake_linear_grpo(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needed = rest[4]
    logprobs = hidden.new_empty(token_ids.shape[0], dtype=accumulation_dtype(hidden))
    return (
        logprobs,
        torch.empty_like(logprobs),
        hidden.new_empty(hidden.shape if needed[0] else (0,), dtype=_saved_dtype(hidden)),
        weight.new_empty(weight.shape if needed[1] else (0,), dtype=_saved_dtype(weight)),
    )


linear_grpo_op = register_op(
    "linear_grpo", _linear_grpo, fake=_fake_linear_grpo, reads_on_host=True
)
