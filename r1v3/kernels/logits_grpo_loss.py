"""The GRPO loss of logits, and its gradient in the same pass over them.

The factor of a token's loss in the total is known before its log-probability, and the rest of its
gradient depends on no other token. So a row's gradient follows at once from its statistics.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import cuda, devices, reference, softmax_rows
from r1v3.kernels.arguments import (
    as_temperature,
    check_logits,
    check_one_label,
    is_zero,
    number_or_rows,
)
from r1v3.kernels.grpo_loss import loss_and_metrics_of_head
from r1v3.kernels.grpo_terms import GrpoInputs, GrpoOptions, TokenTerms
from r1v3.kernels.logprobs_and_entropy import logprobs_and_entropy
from r1v3.kernels.registration import register_op
from r1v3.kernels.row_labels import RowLabels, part_of
from r1v3.kernels.vocab_parallel import group_name, shard_bounds
from r1v3.kernels.with_gradient import with_gradient_op


def logits_grpo_loss(
    logits: Tensor,
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
    group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of the log-probabilities of `logits`, with their gradient in the same pass.

    Where logits require a gradient it is computed together with the loss, and the backward only
    multiplies it by the upstream gradient, in place, or not at all where that is 1 (scale by
    `normalizer` rather than by a factor on the loss). So a second backward raises.

    Traffic per bfloat16 logit, forward and backward together: 4 bytes with the CUDA kernel (sm_90
    on, r1v3._C built with R1V3_BUILD_CUDA=1, rows up to about 900,000 logits), 6 with Triton on
    other devices, with `group`, and on the CPU. Tokens that do not count are not read. float16,
    whose gradients could underflow before they are scaled, and float64 go the long way:
    `logprobs_and_entropy`, then `grpo_loss`.

    Args:
        logits: [B, T, V], or [N, V] with cu_seqlens; float32, bfloat16, float16 or float64, any
            strides.
        token_ids: [B, T] or [N] integers in [0, vocabulary) or -100, whose log-probability is 0
            and whose logits get no gradient. Labels of masked tokens may be anything.
        old_logprobs ... weights: as in `grpo_loss`, without aggregation "none".
        temperature, vocab_size, group: as in `logprobs_and_entropy`. With `group`, all ranks pass
            the same tokens and get the same loss; there is one collective.
        inplace_backward: `logits` may be overwritten with their gradient, by this call already:
            they must not be read afterwards. Ignored under torch.compile, and where rows share
            memory.

    Returns:
        loss and metrics of `grpo_loss`, and besides, detached: "entropy", the mean over valid
        tokens, and "token_entropy" and "token_logprobs", both of the shape of token_ids and zero
        where the mask is False or the label is -100.

    Raises:
        ValueError: if shapes or dtypes do not match, the temperature is negative or infinite,
            vocab_size exceeds the columns, an option is one that `grpo_loss` refuses, or, on
            the CPU, a label is out of range.
    """
    check_logits(logits, vocab_size if group is None else None)
    shape = tuple(logits.shape[:-1])
    degrees = as_temperature(temperature, shape, logits.device)
    check_one_label(token_ids, shape)
    options = GrpoOptions(
        clip_low, clip_high, dual_clip, ratio_clip, kl_coef, kl, unbiased_kl, aggregation
    )
    inputs = GrpoInputs.of(
        logits.new_empty(shape, dtype=reference.accumulation_dtype(logits)), old_logprobs,
        advantages, loss_mask, ref_logprobs, weights, cu_seqlens, normalizer, options,
    )  # fmt: skip
    mask, terms = TokenTerms.of(inputs)
    ids = torch.where(mask, token_ids.reshape(-1), reference.IGNORED_TOKEN).to(torch.int64)
    gradient = None
    if logits.dtype in cuda.SUPPORTED:
        x = logits.detach()
        if torch.is_grad_enabled() and logits.requires_grad:
            inplace = inplace_backward and not torch.compiler.is_compiling()
            inplace = inplace and softmax_rows.writable_in_place(x)
            gradient = x if inplace else x.new_empty(x.shape)
        logprobs, entropy = _logits_grpo_op(
            x, gradient, ids, terms.tensors(), terms.options, degrees, vocab_size, group_name(group)
        )  # fmt: skip
    else:
        if degrees.dim():  # that of a token that does not count may be anything
            temperature = torch.where(mask, degrees, 1.0).view(shape)
        logprobs, entropy = logprobs_and_entropy(
            logits, ids.view(shape), temperature=temperature, vocab_size=vocab_size, group=group,
            inplace_backward=inplace_backward,
        )  # fmt: skip
        logprobs, entropy = logprobs.reshape(-1), entropy.detach().reshape(-1)
        entropy = torch.where(ids == reference.IGNORED_TOKEN, 0.0, entropy)
    loss, metrics = loss_and_metrics_of_head(logprobs, entropy, shape, inputs)
    if gradient is not None:
        loss = with_gradient_op(loss, logits, gradient, None, None)
    return loss, metrics


def _logits_grpo(
    logits: Tensor,
    gradient: Tensor | None,
    token_ids: Tensor,
    terms: list[Tensor | None],
    options: list[float],
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] and entropy [n]; writes the gradient, which may be the logits.

    Tokens with a loss scale of 0 or label -100 give 0 for all three.

    Args:
        terms, options: of a `TokenTerms` of all n tokens.
    """
    own, vocab = TokenTerms.of_tensors(terms, options), vocab_size or logits.shape[-1]
    degrees = number_or_rows(temperature)
    if not group and not is_zero(degrees):
        blocks = cuda.cluster(logits, vocab)
        if blocks:
            return cuda.logits_grpo_loss(logits, gradient, token_ids, own, degrees, vocab, blocks)
    keep = (own.loss_scale != 0) & (token_ids != reference.IGNORED_TOKEN)
    if logits.device.type == "cpu" and not devices.runs_triton(logits) and not group:
        # Only the rows that count, since waiting for their number costs nothing here.
        rows = keep.nonzero().squeeze(-1)
        ids, own, mask = token_ids[rows], own[rows], None
        degrees = part_of(degrees, rows)
    else:
        rows, ids, mask = None, torch.where(keep, token_ids, reference.IGNORED_TOKEN), keep
        if isinstance(degrees, Tensor):  # that of a token that does not count may be anything
            degrees = torch.where(keep, degrees, 1.0)
    shard = shard_bounds(logits.shape[-1], vocab_size, group, logits.device)
    labels = RowLabels(ids, rows, degrees, vocab_size, shard, group)
    logprobs, entropy, saved = softmax_rows.forward(logits, labels, keep=mask)
    if gradient is not None:
        upstream = own.grad_logprobs(logprobs, mask)
        softmax_rows.backward(logits, gradient, labels, saved, upstream)
    if rows is None:
        return logprobs, torch.where(keep, entropy, 0.0)
    n = token_ids.shape[0]
    return softmax_rows.scatter(logprobs, rows, n), softmax_rows.scatter(entropy, rows, n)


def _fake_logits_grpo(
    logits: Tensor, gradient: Tensor | None, token_ids: Tensor, terms: list[Tensor], *rest: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(terms[0]), torch.empty_like(terms[0])


_logits_grpo_op = register_op(
    "logits_grpo",
    _logits_grpo,
    fake=_fake_logits_grpo,
    mutates_args=("gradient",),
    reads_on_host=True,
)
