"""lm_head to log-probability, entropy and GRPO loss, without the logits of all rows at once."""

from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import reference
from r1v3.kernels.grpo_loss import grpo_loss


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
    """`logprobs_and_entropy(hidden @ weight.T + bias, token_ids)`."""
    return reference.linear_logprobs_and_entropy(
        hidden,
        weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        vocab_size=vocab_size,
        loss_mask=loss_mask,
    )


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
    """`grpo_loss` of the log-probabilities of `hidden @ weight.T`."""
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
