"""The GRPO loss of logits, and its gradient in the same pass over them.

What a token's loss counts in the total is known before its log-probability, and the rest of its
gradient depends on no other token. So a row's gradient follows at once from its statistics.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import (
    devices,
    linear_tokens,
    logits_grpo_loss_cuda,
    reference,
    softmax_rows,
)
from r1v3.kernels.arguments import (
    KL_ESTIMATORS,
    as_scalar,
    check_logits,
    check_shape,
    check_token_ids,
)
from r1v3.kernels.grpo_arguments import (
    as_normalizer,
    check_options,
    per_sequence_or_token,
    sequence_offsets,
)
from r1v3.kernels.grpo_loss import grpo_loss
from r1v3.kernels.logprobs_and_entropy import logprobs_and_entropy
from r1v3.kernels.scale import scale_
from r1v3.kernels.vocab_parallel import group_name

_Tokens = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
_Options = tuple[float, float, float, float, int]


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
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "sequence-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
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
            and whose logits get no gradient. Labels that do not count may be anything.
        old_logprobs ... weights: as in `grpo_loss`.
        temperature, vocab_size, group: as in `logprobs_and_entropy`. With `group`, all ranks pass
            the same tokens and get the same loss; there is one collective.
        inplace_backward: `logits` may be overwritten with their gradient, by this call already:
            they must not be read afterwards. Ignored under torch.compile, and where rows share
            memory.

    Returns:
        loss and metrics of `grpo_loss`, and besides, detached: "entropy", the mean over valid
        tokens, and "token_entropy" and "token_logprobs", both the shape of token_ids and 0
        where the mask or the label -100 is.

    Raises:
        ValueError: for a shape, dtype or value that makes no sense.
    """
    check_logits(logits, temperature, vocab_size if group is None else None)
    shape = tuple(logits.shape[:-1])
    check_token_ids(token_ids, shape)
    check_options(clip_low, clip_high, dual_clip, kl, aggregation, normalizer)
    mask, tokens = _per_token(
        shape, cu_seqlens, loss_mask, aggregation, normalizer,
        reference.accumulation_dtype(logits), advantages, old_logprobs, ref_logprobs, weights,
    )  # fmt: skip
    ids = torch.where(mask, token_ids.reshape(-1), reference.IGNORED_TOKEN).to(torch.int64)
    gradient = None
    if logits.dtype in logits_grpo_loss_cuda.SUPPORTED:
        logprobs, entropy, gradient = _in_one_pass(
            logits, inplace_backward, ids, *tokens, as_scalar(temperature), vocab_size,
            group_name(group), clip_low, clip_high, dual_clip or 0.0, kl_coef,
            KL_ESTIMATORS.index(kl),
        )  # fmt: skip
    else:
        logprobs, entropy = logprobs_and_entropy(
            logits, ids.view(shape), temperature=temperature, vocab_size=vocab_size, group=group,
            inplace_backward=inplace_backward,
        )  # fmt: skip
        keep = ids != reference.IGNORED_TOKEN
        entropy = torch.where(keep, entropy.detach().reshape(-1), 0.0)
    loss, metrics = grpo_loss(
        logprobs.view(shape), old_logprobs, advantages, loss_mask, ref_logprobs=ref_logprobs,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef, kl=kl,
        aggregation=aggregation, cu_seqlens=cu_seqlens, normalizer=normalizer, weights=weights,
    )  # fmt: skip
    if gradient is not None:
        loss = _with_logits_gradient(loss, logits, gradient)
    metrics["entropy"] = entropy.sum() / metrics["tokens"].clamp(min=1)
    metrics["token_entropy"] = entropy.view(shape)
    metrics["token_logprobs"] = logprobs.detach().view(shape)
    return loss, metrics


def _per_token(
    shape: tuple[int, ...],
    cu_seqlens: Tensor | None,
    loss_mask: Tensor,
    aggregation: str,
    normalizer: Tensor | float | None,
    dtype: torch.dtype,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, _Tokens]:
    """Which of the n tokens count, and their share in the total, advantages, old and so on, [n]."""
    check_shape("loss_mask", loss_mask, shape)
    for name, tensor in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if tensor is not None:
            check_shape(name, tensor, shape)
    offsets = sequence_offsets(torch.empty_like(loss_mask, dtype=dtype), cu_seqlens)
    sequences = offsets.shape[0] - 1
    sequence, inside = linear_tokens.sequence_of_tokens(offsets, loss_mask.numel())
    mask = (loss_mask != 0).reshape(-1) & inside
    share = linear_tokens.share_of_tokens(
        mask, sequence, sequences, aggregation, as_normalizer(normalizer), dtype
    )

    def spread(name: str, values: Tensor) -> Tensor:
        values = per_sequence_or_token(name, values, shape, sequences)
        return linear_tokens.per_token(values, sequence, dtype).contiguous()

    old, ref = (
        None if x is None else x.detach().reshape(-1).to(dtype).contiguous()
        for x in (old_logprobs, ref_logprobs)
    )
    own = None if weights is None else spread("weights", weights)
    return mask, (share, spread("advantages", advantages), old, ref, own)


def _in_one_pass(
    logits: Tensor, inplace: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and entropy [n], and the gradient where logits require one."""
    x = logits.detach()
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return *_logits_grpo(x, False, *arguments)[:2], None
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace and softmax_rows.writable_in_place(logits):
        return *_logits_grpo_(x, *arguments), x
    return _logits_grpo(x, True, *arguments)


@torch.library.custom_op("r1v3::logits_grpo", mutates_args=())
def _logits_grpo(
    logits: Tensor,
    with_gradient: bool,
    token_ids: Tensor,
    share: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropy [n], and the gradient, like logits or empty.

    Tokens with share 0 or label -100 give 0 for all three.
    """
    gradient = logits.new_empty(logits.shape if with_gradient else (0,))
    tokens = share, advantages, old_logprobs, ref_logprobs, weights
    logprobs, entropy = _compute(
        logits, gradient if with_gradient else None, token_ids, tokens, float(temperature),
        vocab_size, group, (clip_low, clip_high, dual_clip, kl_coef, kl),
    )  # fmt: skip
    return logprobs, entropy, gradient


@_logits_grpo.register_fake
def _(
    logits: Tensor, with_gradient: bool, token_ids: Tensor, share: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = share.new_empty(share.shape)
    gradient = logits.new_empty(logits.shape if with_gradient else (0,))
    return logprobs, torch.empty_like(logprobs), gradient


@torch.library.custom_op("r1v3::logits_grpo_", mutates_args=("logits",))
def _logits_grpo_(
    logits: Tensor,
    token_ids: Tensor,
    share: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
) -> tuple[Tensor, Tensor]:
    """As `_logits_grpo`, with the gradient in place of the logits."""
    tokens = share, advantages, old_logprobs, ref_logprobs, weights
    return _compute(
        logits, logits, token_ids, tokens, float(temperature), vocab_size, group,
        (clip_low, clip_high, dual_clip, kl_coef, kl),
    )  # fmt: skip


@_logits_grpo_.register_fake
def _(logits: Tensor, token_ids: Tensor, share: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return share.new_empty(share.shape), share.new_empty(share.shape)


@torch.library.custom_op("r1v3::with_logits_gradient", mutates_args=())
def _with_logits_gradient(loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """The loss [], whose gradient by the logits is known."""
    return loss.clone()


@_with_logits_gradient.register_fake
def _(loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(loss)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.consumed = False
    ctx.save_for_backward(inputs[2])


def _backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
    if ctx.consumed:
        raise RuntimeError(
            "logits_grpo_loss has handed out the gradient of its logits, which exists once; "
            "a second backward needs a second call"
        )
    (gradient,) = ctx.saved_tensors
    ctx.consumed = True
    scale_(gradient, grad_loss)
    return None, gradient.detach(), None


_with_logits_gradient.register_autograd(_backward, setup_context=_save)


def _compute(
    logits: Tensor,
    gradient: Tensor | None,
    token_ids: Tensor,
    tokens: _Tokens,
    temperature: float,
    vocab_size: int | None,
    group: str,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy [n]; writes the gradient, which may be the logits."""
    vocab = logits.shape[-1] if vocab_size is None else vocab_size
    if gradient is not None and not group and temperature > 0:
        blocks = logits_grpo_loss_cuda.cluster(logits, vocab)
        if blocks:
            from r1v3.kernels.logits_triton import as_rows

            share, advantages, old, ref, weights = tokens
            return logits_grpo_loss_cuda.logits_grpo_loss(
                as_rows(logits), as_rows(gradient), token_ids, share, advantages, old, ref,
                weights, temperature, vocab, blocks, options,
            )  # fmt: skip
    if logits.device.type == "cpu" and not devices.runs_triton(logits) and not group:
        return _on_host(logits, gradient, token_ids, tokens, temperature, vocab_size, options)
    keep = (tokens[0] != 0) & (token_ids != reference.IGNORED_TOKEN)
    ids = torch.where(keep, token_ids, reference.IGNORED_TOKEN)
    logprobs, entropy, saved, shard = softmax_rows.forward(
        logits, ids, None, temperature, vocab_size, group, keep=keep
    )
    if gradient is not None:
        softmax_rows.backward(
            logits, gradient, ids, None, temperature, vocab_size, shard, saved,
            linear_tokens.slope_of_tokens(logprobs, keep, *tokens, options), None,
        )  # fmt: skip
    return logprobs, torch.where(keep, entropy, 0.0)


def _on_host(
    logits: Tensor,
    gradient: Tensor | None,
    token_ids: Tensor,
    tokens: _Tokens,
    temperature: float,
    vocab_size: int | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Only the rows that count, since waiting for their number costs nothing here."""
    keep = (tokens[0] != 0) & (token_ids != reference.IGNORED_TOKEN)
    rows = keep.nonzero().squeeze(-1)
    ids = token_ids[rows]
    chosen, spread, saved, shard = softmax_rows.forward(
        logits, ids, rows, temperature, vocab_size, ""
    )
    if gradient is not None:
        share, advantages = tokens[0][rows], tokens[1][rows]
        old, ref, own = (None if t is None else t[rows] for t in tokens[2:])
        counted = torch.ones_like(ids, dtype=torch.bool)
        slope = linear_tokens.slope_of_tokens(
            chosen, counted, share, advantages, old, ref, own, options
        )
        softmax_rows.backward(
            logits, gradient, ids, rows, temperature, vocab_size, shard, saved, slope, None
        )
    zero = torch.zeros_like(tokens[0])
    return zero.index_copy(0, rows, chosen), zero.index_copy(0, rows, spread)
