"""Log-probability and entropy of softmax(logits / temperature) from one read of the logits.

    logp_t = y_t - lse(y)    H = lse(y) - sum_v p_v y_v    y = logits / temperature, in nats
    dlogits_v = [g_logp (1[v = t] - p_v) - g_H p_v (log p_v + H)] / temperature

The backward reads the logits once more and keeps three numbers per row between the two.
"""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import reference, several_labels, softmax_rows
from r1v3.kernels.arguments import (
    as_temperature,
    check_logits,
    check_rows,
    check_token_ids,
    number_or_rows,
)
from r1v3.kernels.registration import register_op
from r1v3.kernels.row_labels import RowLabels
from r1v3.kernels.vocab_parallel import group_name, shard_bounds


def logprobs_and_entropy(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token, or of K tokens, and entropy of each row, in nats.

    A -inf logit has probability 0. A row of -inf gives logp -inf, entropy 0 and gradient 0. NaN
    and +inf make both results of their row NaN. Label -100 gives logp 0 and adds no gradient.
    Temperature 0 is the limit: uniform over the maxima, gradient 0.

    The same input gives the same bits whatever the other rows are. On CUDA, where V is no
    multiple of 16 bytes, the last bit may depend on the row's alignment, that is on its index
    modulo 8.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any strides.
        token_ids: [...] integers in [0, vocabulary) or -100. Outside it a CPU tensor raises; a
            CUDA tensor gives NaN (nothing here waits for the device). Or [..., K], K labels for
            each row, which may repeat or be -100: the log-probabilities are [..., K], from the
            same reads of the logits and K elements of each row besides.
        temperature: finite and >= 0, a number or a floating-point tensor [...] with one for each
            row (with `rows` too, which selects from it); a tensor gets no gradient.
        vocab_size: the true vocabulary where columns are padded; columns from it on carry no
            probability and get exactly zero gradient.
        rows: int64 [n], distinct indices into the flattened leading dimensions: only these rows
            are computed, and the results are [n].
        group: the vocabulary is sharded over this group, in rank order; shards may differ in
            width, `vocab_size` counts all of them, and every rank must call with the same rows.
            The backward expects the same upstream gradient on every rank.
        inplace_backward: the backward may overwrite `logits` with their gradient, which saves
            a tensor of their size; a second backward then raises RuntimeError. Ignored under
            torch.compile, which plans memory itself, and where logits share memory.

    Returns:
        logprobs and entropy, [...] or [n], float32 (float64 for float64 logits); with K labels,
        logprobs [..., K] or [n, K].

    Raises:
        ValueError: if shapes or dtypes do not match, the temperature is negative or infinite,
            vocab_size exceeds the columns, or, on the CPU, a label, a row or a row's temperature is
            out of range. A CUDA tensor gives NaN for such a temperature.
    """
    logprobs, entropy = _results(
        logits, token_ids, rows, temperature, vocab_size, group, inplace_backward, True
    )
    return logprobs, entropy


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats; see `logprobs_and_entropy`.

    Args:
        logits: [..., V]; the other arguments are those of `logprobs_and_entropy`.

    Returns:
        [...] (or [len(rows)]) float32 (float64 for float64 logits).

    Raises:
        ValueError: if shapes or dtypes do not match, the temperature is negative or infinite,
            vocab_size exceeds the columns, or, on the CPU, a label, a row or a row's temperature is
            out of range.
    """
    return _results(logits, None, rows, temperature, vocab_size, group, False, True)[1]


def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """log softmax(logits / temperature) at token_ids, in nats; see `logprobs_and_entropy`.

    Args:
        logits: [..., V]; token_ids: [...] or [..., K]; the rest as in `logprobs_and_entropy`.

    Returns:
        [...] (or [len(rows)]), with K labels [..., K], float32 (float64 for float64 logits).

    Raises:
        ValueError: if shapes or dtypes do not match, the temperature is negative or infinite,
            vocab_size exceeds the columns, or, on the CPU, a label, a row or a row's temperature is
            out of range.
    """
    return _results(logits, token_ids, rows, temperature, vocab_size, group, False, False)[0]


def _results(
    logits: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: float | Tensor,
    vocab_size: int | None,
    group: ProcessGroup | None,
    inplace_backward: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    check_logits(logits, vocab_size if group is None else None)
    shape = logits.shape[:-1]
    degrees = as_temperature(temperature, shape, logits.device)
    check_rows(rows)
    ids = None
    labels: tuple[int, ...] = ()
    if token_ids is not None:
        labels = check_token_ids(token_ids, shape)
        ids = token_ids.reshape(shape.numel(), *labels).contiguous()
    rows = None if rows is None else rows.contiguous()
    if ids is not None and rows is not None:
        ids = ids[rows]
    if degrees.dim() and rows is not None:
        degrees = degrees[rows]
    inplace = inplace_backward and not torch.compiler.is_compiling()
    logprobs, entropy, _, _ = _logprobs_op(
        logits, ids, rows, degrees, vocab_size, group_name(group), inplace,
        with_entropy,
    )  # fmt: skip
    shape = shape if rows is None else rows.shape
    return logprobs.view((*shape, *labels)), entropy.view(shape) if with_entropy else entropy


def _logprobs_and_entropy(
    logits: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    inplace_backward: bool,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [n] or [n, K], entropy [n] or [0], the backward's [n, 3], and the shard."""
    shard = shard_bounds(logits.shape[-1], vocab_size, group, logits.device)
    labels = RowLabels(token_ids, rows, number_or_rows(temperature), vocab_size, shard, group)
    logprobs, entropy, saved = softmax_rows.forward(logits, labels, with_entropy=with_entropy)
    return logprobs, entropy if with_entropy else logprobs.new_empty(0), saved, shard


def _fake_logprobs_and_entropy(
    logits: Tensor, token_ids: Tensor | None, rows: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, group, _, with_entropy = rest
    n = math.prod(logits.shape[:-1]) if rows is None else rows.shape[0]
    labels = () if token_ids is None else token_ids.shape[1:]
    logprobs = logits.new_empty(n, *labels, dtype=reference.accumulation_dtype(logits))
    shard = logits.new_empty(2 if group else 0, dtype=torch.int64)
    entropy = logprobs.new_empty(n if with_entropy else 0)
    return logprobs, entropy, logprobs.new_empty(n, 3), shard


def _logits_gradient(
    logits: Tensor,
    gradient: Tensor,
    token_ids: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    shard: Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Write the gradient, which may be the logits."""
    labels = RowLabels(token_ids, rows, number_or_rows(temperature), vocab_size, shard)
    if token_ids is not None and token_ids.dim() == 2 and grad_logprobs is not None:
        grad_logprobs = several_labels.summed_gradients(grad_logprobs, token_ids)
    softmax_rows.backward(logits, gradient, labels, saved, grad_logprobs, grad_entropy)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, token_ids, rows, temperature, ctx.vocab_size, _, ctx.inplace, _ = inputs
    _, _, saved, shard = output
    ctx.set_materialize_grads(False)
    ctx.consumed = False
    ctx.save_for_backward(logits, token_ids, rows, temperature, shard, saved)


@torch.autograd.function.once_differentiable
def _backward(ctx, grad_logprobs, grad_entropy, _saved, _shard):  # type: ignore[no-untyped-def]
    rest = (None,) * 7
    if grad_logprobs is None and grad_entropy is None:
        return None, *rest
    if ctx.consumed:
        raise RuntimeError(
            "logprobs_and_entropy(..., inplace_backward=True) has already overwritten the logits "
            "with their gradient; a second backward needs inplace_backward=False"
        )
    logits, token_ids, rows, temperature, shard, saved = ctx.saved_tensors
    ctx.consumed = ctx.inplace and softmax_rows.writable_in_place(logits)
    gradient = logits.detach() if ctx.consumed else logits.new_empty(logits.shape)
    _logits_gradient_op(
        logits, gradient, token_ids, rows, temperature, ctx.vocab_size, shard, saved,
        grad_logprobs, grad_entropy,
    )  # fmt: skip
    return gradient, *rest


_logits_gradient_op = register_op(
    "logits_gradient", _logits_gradient, fake=lambda *_: None, mutates_args=("gradient",),
    reads_on_host=True,
)  # fmt: skip
_logprobs_op = register_op(
    "logprobs_and_entropy", _logprobs_and_entropy, fake=_fake_logprobs_and_entropy,
    backward=_backward, setup_context=_save, reads_on_host=True,
)  # fmt: skip
