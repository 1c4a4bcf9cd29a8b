"""lm_head to log-probability, entropy and GRPO loss, one chunk of logits at a time.

Rows that do not count are dropped before any matrix product, the logits of a chunk are float32
whatever the weight's dtype, and the backward computes them again instead of keeping them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import reference, softmax_rows, vocab_parallel
from r1v3.kernels.arguments import as_scalar, check_logits, check_shape, check_token_ids
from r1v3.kernels.grpo_loss import grpo_loss

CHUNK_ELEMENTS = 2**27
CHUNK_ROWS = 4096


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    loss_mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprobs_and_entropy(hidden @ weight.T + bias, token_ids)` without all the logits.

    At most 512 MiB of float32 logits exist at a time. Run to run the bits are equal; across
    batch sizes they are as equal as those of the matrix product underneath. On CUDA, dropping
    the rows that do not count needs their number on the host: one synchronisation.

    Args:
        hidden: [..., H].
        weight: [V, H], or this rank's [V_local, H] with `group`; hidden is then the same on
            every rank, and its gradient is summed over the group in the backward.
        token_ids: [...] integers in [0, vocabulary) or -100.
        bias: [V] or None.
        temperature, vocab_size, group: as in `logprobs_and_entropy`.
        loss_mask: [...], not 0 where a row counts, or None. A row that does not count, or has
            label -100, gives 0 for both results and no gradient.

    Returns:
        logprobs and entropy, [...] float32 (float64 for float64 hidden), differentiable in
        hidden, weight and bias.

    Raises:
        ValueError: for a shape, dtype or value that makes no sense.
    """
    shape = tuple(hidden.shape[:-1])
    check_token_ids(token_ids, shape)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[-1]}] for hidden {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    if loss_mask is not None:
        check_shape("loss_mask", loss_mask, shape)
        loss_mask = (loss_mask != 0).reshape(-1)
    check_logits(weight.T, temperature, vocab_size if group is None else None)
    logprobs, entropy, _, _ = _linear(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        token_ids.reshape(-1),
        loss_mask,
        as_scalar(temperature),
        vocab_size,
        vocab_parallel.group_name(group),
    )
    return logprobs.view(shape), entropy.view(shape)


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
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "sequence-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of the log-probabilities of `hidden @ weight.T`, without all the logits.

    Args:
        hidden: [B, T, H], or [N, H] with cu_seqlens.
        weight, token_ids, temperature, vocab_size, group: as in `linear_logprobs_and_entropy`.
        The rest: as in `grpo_loss`.

    Returns:
        loss and metrics of `grpo_loss`, and besides, detached: "entropy", the mean over valid
        tokens, and "token_entropy" and "token_logprobs", both the shape of token_ids and 0
        where the mask is.

    Raises:
        ValueError: for a shape, dtype or value that makes no sense.
    """
    logprobs, entropy = linear_logprobs_and_entropy(
        hidden,
        weight,
        token_ids,
        temperature=temperature,
        vocab_size=vocab_size,
        loss_mask=loss_mask,
        group=group,
    )
    loss, metrics = grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        ref_logprobs=ref_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl=kl,
        aggregation=aggregation,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        weights=weights,
    )
    token_entropy = entropy.detach()
    metrics["entropy"] = token_entropy.sum() / metrics["tokens"].clamp(min=1)
    metrics["token_entropy"] = token_entropy
    metrics["token_logprobs"] = logprobs.detach()
    return loss, metrics


@torch.library.custom_op("r1v3::linear_logprobs_and_entropy", mutates_args=())
def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.accumulation_dtype(hidden)
    n = hidden.shape[0]
    results = hidden.new_zeros(n, 5, dtype=dtype)
    product = _Product(weight, hidden.dtype)
    shard = torch.zeros(2 if group else 0, dtype=torch.int64, device=hidden.device)
    for rows in _chunks(token_ids, loss_mask, weight.shape[0]):
        logits = product.logits(hidden[rows], bias)
        logprobs, entropy, saved, shard = softmax_rows.forward(
            logits, token_ids[rows], None, float(temperature), vocab_size, group
        )
        results[rows] = torch.cat([logprobs[:, None], entropy[:, None], saved], dim=1)
    return results[:, 0].clone(), results[:, 1].clone(), results[:, 2:].clone(), shard


@_linear.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = hidden.new_empty(hidden.shape[0], dtype=reference.accumulation_dtype(hidden))
    shard = hidden.new_empty(2 if group else 0, dtype=torch.int64)
    return logprobs, torch.empty_like(logprobs), logprobs.new_empty(hidden.shape[0], 3), shard


@torch.library.custom_op("r1v3::linear_gradient", mutates_args=())
def _linear_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    shard: Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = saved.dtype
    need_hidden, need_weight, need_bias = needed
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=dtype)
    grad_bias = weight.new_zeros(weight.shape[:1] if need_bias else (0,), dtype=dtype)
    product = _Product(weight, hidden.dtype)
    for rows in _chunks(token_ids, loss_mask, weight.shape[0]):
        chunk = hidden[rows]
        logits = product.logits(chunk, bias)
        softmax_rows.backward(
            logits, logits, token_ids[rows], None, float(temperature), vocab_size, shard,
            saved[rows], None if grad_logprobs is None else grad_logprobs[rows],
            None if grad_entropy is None else grad_entropy[rows],
        )  # fmt: skip
        if need_bias:
            grad_bias += logits.sum(0)
        if need_hidden:
            grad_hidden[rows] = product.gradient_of_hidden(logits)
        if need_weight:
            product.add_gradient_of_weight(logits, chunk, grad_weight)
    if group and need_hidden:
        vocab_parallel.all_reduce_(grad_hidden, group)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


@_linear_gradient.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int | None,
    group: str,
    shard: Tensor,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if needed[0] else (0,)),
        weight.new_empty(weight.shape if needed[1] else (0,)),
        weight.new_empty(weight.shape[:1] if needed[2] else (0,), dtype=bias_dtype),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, bias, token_ids, loss_mask, temperature, ctx.vocab_size, ctx.group = inputs
    _, _, saved, shard = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, token_ids, loss_mask, temperature, shard, saved)


def _backward(ctx, grad_logprobs, grad_entropy, _saved, _shard):  # type: ignore[no-untyped-def]
    needed = list(ctx.needs_input_grad[:3])
    rest = (None,) * 5
    if (grad_logprobs is None and grad_entropy is None) or not any(needed):
        return None, None, None, *rest
    *inputs, shard, saved = ctx.saved_tensors
    gradients = _linear_gradient(
        *inputs, ctx.vocab_size, ctx.group, shard, saved, grad_logprobs, grad_entropy, needed
    )
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *rest


_linear.register_autograd(_backward, setup_context=_save)


def _chunks(token_ids: Tensor, loss_mask: Tensor | None, width: int) -> Iterator[Tensor]:
    """Indices of the rows that count, as many at a time as logits may exist."""
    keep = token_ids != reference.IGNORED_TOKEN
    if loss_mask is not None:
        keep = keep & loss_mask
    rows = keep.nonzero().squeeze(-1)
    size = CHUNK_ELEMENTS // max(width, 1)
    size = min(size // 128 * 128 if size >= 128 else max(size, 1), CHUNK_ROWS)
    for start in range(0, rows.shape[0], size):
        yield rows[start : start + size]


class _Product:
    """Matrix products with one lm_head weight, accumulated and returned in float32 (or float64).

    On CUDA, bfloat16 goes through bfloat16 tensor cores with float32 results; elsewhere the
    operands are converted. float16 is always converted, so that small gradients do not underflow.
    """

    def __init__(self, weight: Tensor, hidden_dtype: torch.dtype) -> None:
        self.dtype = torch.float64 if hidden_dtype == torch.float64 else torch.float32
        self.tensor_cores = weight.is_cuda and weight.dtype == hidden_dtype == torch.bfloat16
        self.weight = weight if self.tensor_cores else weight.to(self.dtype)

    def logits(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        logits = self._multiply(hidden, self.weight.T)
        return logits if bias is None else logits.add_(bias)

    def gradient_of_hidden(self, grad_logits: Tensor) -> Tensor:
        return self._multiply(grad_logits, self.weight)

    def add_gradient_of_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
        if self.tensor_cores:
            out += self._multiply(grad_logits.T, hidden)
        else:
            out.addmm_(grad_logits.T, hidden.to(self.dtype))

    def _multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if self.tensor_cores:
            return torch.mm(a.to(torch.bfloat16), b, out_dtype=torch.float32)
        return a.to(self.dtype) @ b.to(self.dtype)
