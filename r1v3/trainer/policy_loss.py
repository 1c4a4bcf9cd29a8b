"""The loss of a policy step on micro-batches, and its metrics (report eq. 4, 5 and 7)."""

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r1v3.config import PolicyLoss
from r1v3.engine.head import Head
from r1v3.kernels import grpo_loss
from r1v3.kernels.reference import LOG_RATIO_LIMIT
from r1v3.rollout.mismatch import Mismatch, importance_weights

# Gap of a token to the reference in nats that counts as high, and the weight of a token in the KL
# gradient that is warned of: k3 passes it at a gap of 4.6.
HIGH_GAP = 5.0
HIGH_WEIGHT = 100.0


@dataclass(frozen=True)
class Targets:
    """Inputs of the loss of a micro-batch of N responses, besides the current log-probs.

    Attributes:
        loss_mask: bool [N, R], True at tokens that count.
        advantages: float32 [N].
        rollout_logprobs: float32 [N, R], log-probs of the sampler in nats.
        sampled: bool [N, R], True at tokens that count and were drawn by the sampler, not forced.
        old_logprobs: float32 [N, R], of the policy that ratios are taken to; None stands for the
            current policy, detached.
        ref_logprobs: float32 [N, R], of the reference policy of the KL term, or None.
    """

    loss_mask: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    sampled: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def to(self, device: torch.device) -> "Targets":
        """Return the same targets on a device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)


class PolicyLossFn:
    """A `contract.LossFn`: the clipped loss of micro-batch i against `targets[i]`.

    Args:
        targets: those of all micro-batches of the gradient step.
        max_tokens: longest response; the divisor per response of aggregation "constant".
    """

    def __init__(self, config: PolicyLoss, targets: Sequence[Targets], max_tokens: int) -> None:
        self.targets = targets
        self.importance_cap = config.importance_cap
        self.options = config.model_dump(exclude={"old_logprobs", "importance_cap"})
        self.options["normalizer"] = normalizer(config.aggregation, targets, max_tokens)

    def __call__(self, head: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics, token log-probs and entropies among them."""
        targets = self.targets[index].to(head.hidden.device)
        if self.importance_cap is None:
            return head.grpo_loss(
                targets.old_logprobs,
                targets.advantages,
                ref_logprobs=targets.ref_logprobs,
                **self.options,
            )
        # The weights need the log-probs before the loss: two passes over the head.
        return self._from_logprobs(*head.logprobs_and_entropy(), targets)

    def metrics(self, logprobs: Tensor, entropy: Tensor, index: int) -> dict[str, Tensor]:
        """Return the metrics of `__call__` for these log-probs and entropies [N, R]."""
        return self._from_logprobs(logprobs, entropy, self.targets[index])[1]

    def _from_logprobs(
        self, logprobs: Tensor, entropy: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = None
        if self.importance_cap is not None:
            old = logprobs.detach() if targets.old_logprobs is None else targets.old_logprobs
            weights = importance_weights(
                old, targets.rollout_logprobs, targets.sampled, self.importance_cap
            )
        loss, metrics = grpo_loss(
            logprobs,
            targets.old_logprobs,
            targets.advantages,
            targets.loss_mask,
            ref_logprobs=targets.ref_logprobs,
            weights=weights,
            **self.options,
        )
        tokens = {"token_logprobs": logprobs.detach(), "token_entropy": entropy.detach()}
        return loss, {**metrics, **tokens}


def gap_metrics(
    targets: Sequence[Targets], outputs: Sequence[dict[str, Tensor]], kl: str
) -> dict[str, float]:
    """Return how far the policy is from the reference, token by token; targets without it: {}.

    ref_gap_max: the largest |ref_logprob - logprob| in nats. ref_gap_share: the share of tokens
    where it is above `HIGH_GAP`. kl_weight_max: the largest derivative of a token's KL estimate by
    its log-prob, in absolute value.
    """
    gaps = torch.cat(
        [
            (one.ref_logprobs - output["token_logprobs"])[one.loss_mask].double()
            for one, output in zip(targets, outputs, strict=True)
            if one.ref_logprobs is not None
        ]
        or [torch.zeros(0, dtype=torch.float64)]
    )
    if not len(gaps):
        return {}
    weights = {"k1": torch.ones_like(gaps), "k2": gaps, "k3": gaps.expm1()}[kl]
    counted = torch.where(gaps.abs() > LOG_RATIO_LIMIT, 0.0, weights)
    return {
        "ref_gap_max": float(gaps.abs().max()),
        "ref_gap_share": float((gaps.abs() > HIGH_GAP).double().mean()),
        "kl_weight_max": float(counted.abs().max()),
    }


def covariance(targets: Sequence[Targets], outputs: Sequence[dict[str, Tensor]]) -> float:
    """Return the covariance over tokens of log-prob and advantage.

    Where it is high, the tokens that a step makes likelier are likely already, and the entropy
    falls (G. Cui et al., "The entropy mechanism of RL for reasoning language models", 2025).
    """
    masks = [one.loss_mask for one in targets]
    if not any(mask.any() for mask in masks):
        return 0.0
    logprobs = torch.cat(
        [o["token_logprobs"][mask].double().cpu() for o, mask in zip(outputs, masks, strict=True)]
    )
    advantages = torch.cat(
        [
            one.advantages[:, None].expand_as(one.loss_mask)[one.loss_mask].double()
            for one in targets
        ]
    )
    return float(((logprobs - logprobs.mean()) * (advantages - advantages.mean())).mean())


def normalizer(aggregation: str, targets: Sequence[Targets], max_tokens: int) -> float:
    """Return the divisor of the summed loss of a whole gradient step."""
    if aggregation == "token-mean":
        return float(sum(int(one.loss_mask.sum()) for one in targets))
    responses = sum(len(one.loss_mask) for one in targets)
    return float(responses * max_tokens if aggregation == "constant" else responses)


def combine(
    targets: Sequence[Targets],
    outputs: Sequence[dict[str, Tensor]],
    importance_cap: float | None = None,
) -> dict[str, float]:
    """Return the metrics of a step from those of its micro-batches, weighted by their tokens."""
    tokens = torch.stack([m["tokens"].double() for m in outputs])
    weights = tokens / tokens.sum().clamp(min=1)
    result = {}
    fractions = ("clip_low_fraction", "clip_high_fraction", "dual_clip_fraction")
    for key in (*fractions, "approx_kl", "ref_kl", "ratio_mean"):
        result[key] = float((torch.stack([m[key].double() for m in outputs]) * weights).sum())
    result["ratio_max"] = max(float(m["ratio_max"]) for m in outputs)
    result["tokens"] = int(tokens.sum())
    result["nonfinite"] = int(sum(float(m["nonfinite"]) for m in outputs))
    cap = math.inf if importance_cap is None else importance_cap
    mismatches = [
        Mismatch.of(output["token_logprobs"], one.rollout_logprobs, one.sampled, cap)
        for output, one in zip(outputs, targets, strict=True)
    ]
    return {**result, **functools.reduce(operator.add, mismatches).metrics()}
