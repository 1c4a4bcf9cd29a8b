"""The language head at the tokens that count, from which losses are computed without logits."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1v3.kernels import grpo_loss, linear_grpo_loss, linear_logprobs_and_entropy


@dataclass(frozen=True)
class ContextTokens:
    """The tokens of a head that one context-parallel rank holds.

    Attributes:
        mask: bool [N, R], True at them.
        group: ranks over which the tokens that count are divided.
    """

    mask: Tensor
    group: ProcessGroup


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group, from which every rank computes the same loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


@dataclass(frozen=True)
class Head:
    """Hidden states and head weight of the M response tokens that count, row by row.

    With `context` only some of them are here. Results are those of all tokens on every rank; the
    gradients of `hidden` and `weight` are this rank's part.

    Attributes:
        hidden: [M, H], the states that predict the tokens.
        weight: [V, H], or this rank's shard of it.
        token_ids: int64 [M].
        loss_mask: bool [N, R], True at the tokens that count; row-major order is the order of the
            M rows.
        temperature: divisor of the logits.
        vocab_size: number of real rows of `weight`, which may be padded; None for all.
        group: ranks over which V is sharded.
        reduce_hidden_grad: whether to sum the gradient of `hidden` over the group; False where
            the operation that produced `hidden` does.
        context: which tokens the M rows are, where they are not all.
    """

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    loss_mask: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None
    group: ProcessGroup | None = None
    reduce_hidden_grad: bool = True
    context: ContextTokens | None = None

    def logprobs_and_entropy(self) -> tuple[Tensor, Tensor]:
        """Compute log-probs and entropies [N, R] in nats, zero where the mask is False."""
        logprobs, entropy = linear_logprobs_and_entropy(
            self.hidden, self.weight, self.token_ids, **self._sharding()
        )
        if self.context is None:
            return self._scatter(logprobs), self._scatter(entropy)
        both = torch.stack([self._scatter(logprobs), self._scatter(entropy)])
        logprobs, entropy = _SumOverRanks.apply(both, self.context.group)
        return logprobs, entropy

    def grpo_loss(
        self,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        *,
        ref_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute `r1v3.kernels.linear_grpo_loss` of these tokens.

        Args:
            old_logprobs, ref_logprobs, weights: [N, R] or None.
            advantages: [N].
            options: those of `r1v3.kernels.grpo_loss`.

        Returns:
            The loss and its metrics, "token_logprobs" and "token_entropy" [N, R] among them.
        """
        if self.context is not None:
            # A sequence's mean takes its tokens on all ranks, so two passes over the head.
            logprobs, entropy = self.logprobs_and_entropy()
            loss, metrics = grpo_loss(
                logprobs,
                old_logprobs,
                advantages,
                self.loss_mask,
                ref_logprobs=ref_logprobs,
                weights=weights,
                **options,
            )
            metrics["entropy"] = entropy.detach().sum() / metrics["tokens"].clamp(min=1)
            metrics["token_entropy"] = entropy.detach()
            metrics["token_logprobs"] = logprobs.detach()
            return loss, metrics
        lengths = self.loss_mask.sum(1)
        each = advantages.repeat_interleave(lengths, output_size=len(self.token_ids))
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        loss, metrics = linear_grpo_loss(
            self.hidden,
            self.weight,
            self.token_ids,
            None if old_logprobs is None else old_logprobs[self.loss_mask],
            each,
            torch.ones_like(self.token_ids, dtype=torch.bool),
            ref_logprobs=None if ref_logprobs is None else ref_logprobs[self.loss_mask],
            weights=None if weights is None else weights[self.loss_mask],
            cu_seqlens=offsets,
            **self._sharding(),
            **options,
        )
        for name in ("token_logprobs", "token_entropy"):
            metrics[name] = self._scatter(metrics[name])
        return loss, metrics

    def _sharding(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"temperature": self.temperature, "vocab_size": self.vocab_size}
        if self.group is not None:
            kwargs["group"] = self.group
        if not self.reduce_hidden_grad:
            kwargs["reduce_hidden_grad"] = False
        return kwargs

    def _scatter(self, values: Tensor) -> Tensor:
        """Scatter values [M] into zeros [N, R]."""
        mask = self.loss_mask if self.context is None else self.context.mask
        return values.new_zeros(mask.shape).masked_scatter(mask, values)
