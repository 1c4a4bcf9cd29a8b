"""The GRPO loss of logits, and its gradient in the same pass over them.

The factor of a token's loss in the total is known before its log-probability, and the rest of its
gradient depends on no other token. So a row's gradient follows at once from its statistics.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import cuda, devices, reference, softmax_rows
from r1v3.kernels.arguments import as_scalar, check_logits, check_token_ids
from r1v3.kernels.grpo_loss import loss_and_metrics
from r1v3.kernels.grpo_terms import GrpoInputs, GrpoOptions, TokenTerms
from r1v3.kernels.logprobs_and_entropy import logprobs_and_entropy
from r1v3.kernels.registration import register_op
from r1v3.kernels.scale import scale_
from r1v3.kernels.vocab_parallel import group_name


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
            and whose logits get no gradient. Labels of masked tokens may be anything.
        old_logprobs ... weights: as in `grpo_loss`.
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
    check_logits(logits, temperature, vocab_size if group is None else None)
    shape = tuple(logits.shape[:-1])
    check_token_ids(token_ids, shape)
    options = GrpoOptions(clip_low, clip_high, dual_clip, ratio_clip, kl_coef, kl, aggregation)
    like = logits.new_empty(shape, dtype=reference.accumulation_dtype(logits))
    inputs = GrpoInputs.of(
        like, old_logprobs, advantages, loss_mask, ref_logprobs, weights, cu_seqlens, normalizer,
        options,
    )  # fmt: skip
    mask, terms = TokenTerms.of(inputs, options)
    ids = torch.where(mask, token_ids.reshape(-1), reference.IGNORED_TOKEN).to(torch.int64)
    gradient = None
    if logits.dtype in cuda.SUPPORTED:
        logprobs, entropy, gradient = _in_one_pass(
            logits, inplace_backward, ids, terms.tensors(), terms.options, as_scalar(temperature),
            vocab_size, group_name(group),
        )  # fmt: skip
    else:
        logprobs, entropy = logprobs_and_entropy(
            logits, ids.view(shape), temperature=temperature, vocab_size=vocab_size, group=group,
            inplace_backward=inplace_backward,
        )  # fmt: skip
        logprobs = logprobs.reshape(-1)
        keep = ids != reference.IGNORED_TOKEN
        entropy = torch.where(keep, entropy.detach().reshape(-1), 0.0)
    loss, metrics = loss_and_metrics(logprobs, inputs, options)
    if gradient is not None:
        loss = _with_gradient_op(loss, logits, gradient)
    metrics["entropy"] = entropy.sum() / metrics["tokens"].clamp(min=1)
    metrics["token_entropy"] = entropy.view(shape)
    metrics["token_logprobs"] = logprobs.detach().view(shape)
    return loss, metrics


def _in_one_pass(
    logits: Tensor, inplace: bool, *arguments: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and entropy [n], and the gradient where logits require one."""
    x = logits.detach()
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return *_logits_grpo_op(x, False, *arguments)[:2], None
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace and softmax_rows.writable_in_place(logits):
        return *_logits_grpo_inplace_op(x, *arguments), x
    logprobs, entropy, gradient = _logits_grpo_op(x, True, *arguments)
    return logprobs, entropy, gradient


def _logits_grpo(
    logits: Tensor,
    with_gradient: bool,
    token_ids: Tensor,
    terms: list[Tensor | None],
    options: list[float],
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [n], entropy [n], and the gradient, like logits or empty.

    Tokens with a loss scale of 0 or label -100 give 0 for all three.

    Args:
        terms, options: of a `TokenTerms` of all n tokens.
    """
    gradient = logits.new_empty(logits.shape if with_gradient else (0,))
    logprobs, entropy = _compute(
        logits, gradient if with_gradient else None, token_ids,
        TokenTerms.of_tensors(terms, options), float(temperature), vocab_size, group,
    )  # fmt: skip
    return logprobs, entropy, gradient


def _fake_logits_grpo(
    logits: Tensor, with_gradient: bool, token_ids: Tensor, terms: list[Tensor], *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty_like(terms[0])
    gradient = logits.new_empty(logits.shape if with_gradient else (0,))
    return logprobs, torch.empty_like(logprobs), gradient


def _logits_grpo_inplace(
    logits: Tensor,
    token_ids: Tensor,
    terms: list[Tensor | None],
    options: list[float],
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    """As `_logits_grpo`, with the gradient in place of the logits."""
    return _compute(
        logits, logits, token_ids, TokenTerms.of_tensors(terms, options), float(temperature),
        vocab_size, group,
    )  # fmt: skip


def _fake_logits_grpo_inplace(
    logits: Tensor, token_ids: Tensor, terms: list[Tensor], *rest: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(terms[0]), torch.empty_like(terms[0])


def _with_gradient(loss: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
    """The loss [], whose gradient by the logits is known."""
    return loss.clone()


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


_logits_grpo_op = register_op("logits_grpo", _logits_grpo, fake=_fake_logits_grpo)
_logits_grpo_inplace_op = register_op(
    "logits_grpo_", _logits_grpo_inplace, fake=_fake_logits_grpo_inplace, mutates_args=("logits",)
)
_with_gradient_op = register_op(
    "with_logits_gradient", _with_gradient, fake=lambda loss, *rest: torch.empty_like(loss),
    backward=_backward, setup_context=_save,
)  # fmt: skip


def _compute(
    logits: Tensor,
    gradient: Tensor | None,
    token_ids: Tensor,
    terms: TokenTerms,
    temperature: float,
    vocab_size: int | None,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy [n]; writes the gradient, which may be the logits."""
    vocab = logits.shape[-1] if vocab_size is None else vocab_size
    if gradient is not None and not group and temperature > 0:
        blocks = cuda.cluster(logits, vocab)
        if blocks:
            return cuda.logits_grpo_loss(
                logits, gradient, token_ids, terms, temperature, vocab, blocks
            )
    keep = (terms.loss_scale != 0) & (token_ids != reference.IGNORED_TOKEN)
    if logits.device.type == "cpu" and not devices.runs_triton(logits) and not group:
        # Only the rows that count, since waiting for their number costs nothing here.
        rows = keep.nonzero().squeeze(-1)
        ids, terms, mask = token_ids[rows], terms[rows], None
    else:
        rows, ids, mask = None, torch.where(keep, token_ids, reference.IGNORED_TOKEN), keep
    logprobs, entropy, saved, shard = softmax_rows.forward(
        logits, ids, rows, temperature, vocab_size, group, keep=mask
    )
    if gradient is not None:
        softmax_rows.backward(
            logits, gradient, ids, rows, temperature, vocab_size, shard, saved,
            terms.grad_logprobs(logprobs, mask), None,
        )  # fmt: skip
    if rows is None:
        return logprobs, torch.where(keep, entropy, 0.0)
    zero = logprobs.new_zeros(token_ids.shape[0])
    return zero.index_copy(0, rows, logprobs), zero.index_copy(0, rows, entropy)
