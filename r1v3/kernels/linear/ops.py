"""Language head to log-probability, entropy and GRPO loss, a part of the logits at a time.

Rows that do not count are dropped before any matrix product. Logits are float32 whatever the
weight's dtype, and so are the sums of every gradient, which is rounded once.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import reference
from r1v3.kernels.arguments import (
    as_temperature,
    check_logits,
    check_one_label,
    check_rows,
    check_shape,
    check_token_ids,
)
from r1v3.kernels.grpo_loss import loss_and_metrics_of_head
from r1v3.kernels.grpo_terms import GrpoInputs, GrpoOptions, TokenTerms
from r1v3.kernels.linear.grpo import linear_grpo_op
from r1v3.kernels.linear.logprobs import linear_logprobs_op
from r1v3.kernels.vocab_parallel import group_name
from r1v3.kernels.with_gradient import with_gradient_op


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    row_tile: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprobs_and_entropy(hidden @ weight.T + bias, token_ids)` without all the logits.

    The backward computes the logits again, a tile at a time. What is allocated besides results
    and gradients is a tile and, for a backward, the float32 gradient of hidden: nothing grows
    with rows times vocabulary. A gradient that is not required costs no product.

    Args:
        hidden: [..., H].
        weight: [V, H], or this rank's [V_local, H] with `group`; hidden is then the same on
            every rank.
        token_ids: [...] integers in [0, vocabulary) or -100, or [..., K] of K labels for each row.
        bias: [V] or None.
        temperature, vocab_size, group: as in `logprobs_and_entropy`.
        loss_mask: [...], nonzero where a row counts, or None. A row that does not count, or has
            no label but -100, gives 0 for both results and no gradient. On CUDA, finding the rows
            is one synchronization with the host; with `rows` there is none.
        rows: int64 [n] into the flattened leading dimensions, without repetition, instead of a
            loss_mask: only these rows are computed, and the results are [n].
        reduce_hidden_grad: with `group`: sum the gradient of hidden over the ranks, while the
            last products for the weight run. False leaves each rank its own part, for a caller
            who sums it.
        row_tile: if given, every product is of exactly this many rows, padded with zeros, so that
            a row's result has the same bits in any batch, as far as the BLAS treats the rows of
            one shape alike. Without it, matrix libraries choose kernels by the number of rows. Give
            it to compare log-probabilities from different batches bit for bit, where the hidden
            states do not depend on the batch either.
        logit_scale, softcap: the logits are logit_scale * (hidden @ weight.T + bias), and where a
            softcap is given softcap * tanh(of that / softcap), as in Cohere, Granite and Gemma; the
            temperature divides what comes out.

    Returns:
        logprobs and entropy, [...] or [n], float32 (float64 for float64 hidden), differentiable
        in hidden, weight and bias; with K labels, logprobs [..., K] or [n, K]. Run to run the bits
        are equal, and equal on all ranks.

    Raises:
        ValueError: if shapes or dtypes do not match, the temperature is negative or infinite,
            vocab_size exceeds V, logit_scale or softcap is not positive and finite, or, on the CPU,
            a label, a row or a counting row's temperature is out of range.
    """
    shape = _check_head(hidden, weight)
    labels = check_token_ids(token_ids, shape)
    check_logits(weight.T, vocab_size if group is None else None)
    degrees = as_temperature(temperature, shape, hidden.device)
    degrees, cap = _fold(degrees, logit_scale, softcap)
    _check_row_tile(row_tile)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    if loss_mask is not None:
        if rows is not None:
            raise ValueError("rows already say what counts: give rows or loss_mask, not both")
        check_shape("loss_mask", loss_mask, shape)
        loss_mask = (loss_mask != 0).reshape(-1)
    check_rows(rows)
    logprobs, entropy, _, _ = linear_logprobs_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        token_ids.reshape(shape.numel(), *labels),
        loss_mask,
        rows,
        degrees,
        vocab_size,
        group_name(group),
        reduce_hidden_grad,
        row_tile or 0,
        cap,
    )
    shape = shape if rows is None else rows.shape
    return logprobs.view((*shape, *labels)), entropy.view(shape)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_clip: str = "ppo",
    kl_coef: float = 0.0,
    kl: str = "k3",
    unbiased_kl: bool = False,
    aggregation: str = "sequence-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    rows: Tensor | None = None,
    group: ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    row_tile: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of the log-probabilities of `hidden @ weight.T`, in one pass over the head.

    Where a gradient is required, it is computed together with the loss: three matrix products
    instead of the four of a recomputing backward, which then only multiplies by the upstream
    gradient (in place: a second backward raises). As many rows at a time as `CPU_WORKSPACE`,
    `DEVICE_WORKSPACE` or `GROUP_WORKSPACE` of `tiles` allow; on the CPU, up to H rows (H / 2 with
    bfloat16) keep their logits where the weight's gradient will be.

    If that is more than one chunk, the gradient of a 16-bit weight is summed in a float32 [V, H]
    of its own. On the CPU the logits are then computed twice instead.

    Args:
        hidden: [B, T, H], or [N, H] with cu_seqlens.
        weight, token_ids, temperature, vocab_size, group, reduce_hidden_grad, row_tile,
            logit_scale, softcap: as in `linear_logprobs_and_entropy`; one label for each row.
        old_logprobs ... weights: as in `grpo_loss`, without aggregation "none". Without
            old_logprobs the policy is the one that sampled, and its own log-probabilities take
            their place, detached.
        rows: int64 [n], where the flattened loss_mask is nonzero, to spare CUDA a synchronization.

    Returns:
        loss and metrics of `grpo_loss`, and besides, detached: "entropy", the mean over valid
        tokens, and "token_entropy" and "token_logprobs", both of the shape of token_ids and zero
        where the mask is False.

    Raises:
        ValueError: if shapes or dtypes do not match, the temperature is negative or infinite,
            vocab_size exceeds V, logit_scale or softcap is not positive and finite, an option is
            one that `grpo_loss` refuses, or, on the CPU, a label or a counting row's temperature is
            out of range or rows are not those of the mask.
    """
    shape = _check_head(hidden, weight)
    check_one_label(token_ids, shape)
    check_logits(weight.T, vocab_size if group is None else None)
    degrees = as_temperature(temperature, shape, hidden.device)
    degrees, cap = _fold(degrees, logit_scale, softcap)
    _check_row_tile(row_tile)
    options = GrpoOptions(
        clip_low, clip_high, dual_clip, ratio_clip, kl_coef, kl, unbiased_kl, aggregation
    )
    inputs = GrpoInputs.of(
        hidden.new_empty(shape, dtype=reference.accumulation_dtype(hidden)), old_logprobs,
        advantages, loss_mask, ref_logprobs, weights, cu_seqlens, normalizer, options,
    )  # fmt: skip
    mask, terms = TokenTerms.of(inputs)
    _check_rows_are_the_mask(rows, mask)
    states = hidden.reshape(-1, hidden.shape[-1])
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (states, weight)]
    logprobs, entropy, grad_states, grad_weight = linear_grpo_op(
        states.detach(), weight.detach(), token_ids.reshape(-1), mask, rows, terms.tensors(),
        terms.options, needed, degrees, vocab_size, group_name(group),
        reduce_hidden_grad, row_tile or 0, cap,
    )  # fmt: skip
    loss, metrics = loss_and_metrics_of_head(logprobs, entropy, shape, inputs)
    if any(needed):
        loss = with_gradient_op(loss, states, grad_states, weight, grad_weight)
    return loss, metrics


def _check_head(hidden: Tensor, weight: Tensor) -> torch.Size:
    """The shape of the results; raises ValueError unless the two fit together."""
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[-1] if hidden.dim() else 'H'}] for hidden "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    return hidden.shape[:-1]


def _fold(temperature: Tensor, logit_scale: float, softcap: float | None) -> tuple[Tensor, float]:
    """Temperature and softcap (0 for None) of the unscaled logits with the same softmax.

    s x / T is x / (T / s), and so is c tanh(s x / c) / T for the soft cap c / s.
    """
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if logit_scale != 1:
        temperature = temperature / logit_scale
    return temperature, 0.0 if softcap is None else softcap / logit_scale


def _check_row_tile(row_tile: int | None) -> None:
    if row_tile is not None and row_tile < 1:
        raise ValueError(f"row_tile must be >= 1 or None, got {row_tile}")


def _check_rows_are_the_mask(rows: Tensor | None, mask: Tensor) -> None:
    check_rows(rows)
    if rows is None or rows.is_cuda or torch.compiler.is_compiling():
        return
    if not torch.equal(rows.sort().values, mask.nonzero().squeeze(-1)):
        raise ValueError(
            f"rows must be the {int(mask.sum())} places where loss_mask is not 0, "
            f"got {rows.shape[0]}: {rows[:8].tolist()}"
        )
