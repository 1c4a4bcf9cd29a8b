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
from r1v3.kernels.arguments import METRICS
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
        targets: those of this replica's micro-batches.
        normalizer: divisor of the summed loss of the gradient step, see `normalizer`.
    """

    def __init__(self, config: PolicyLoss, targets: Sequence[Targets], normalizer: float) -> None:
        self.targets = targets
        self.importance_cap = config.importance_cap
        self.options = config.model_dump(exclude={"old_logprobs", "importance_cap"})
        self.options["normalizer"] = normalizer

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


def normalizer(aggregation: str, lengths: Sequence[int], max_tokens: int) -> float:
    """Return the divisor of the summed loss of a whole gradient step.

    Args:
        lengths: tokens that count, of every response of the step.
        max_tokens: longest response; the divisor per response of aggregation "constant".
    """
    if aggregation == "token-mean":
        return float(sum(lengths))
    return float(len(lengths) * max_tokens if aggregation == "constant" else len(lengths))


# Metrics of a micro-batch that are means over its tokens.
_MEANS = tuple(name for name in METRICS if name not in ("ratio_max", "tokens", "nonfinite"))
_GROUPS = (len(METRICS), 5, 4, 4)
# Numbers of `statistics`.
WIDTH = sum(_GROUPS)


def statistics(targets: Targets, output: dict[str, Tensor], config: PolicyLoss) -> Tensor:
    """Return what `combine` needs of a micro-batch, float64 [WIDTH]."""
    cap = math.inf if config.importance_cap is None else config.importance_cap
    mismatch = Mismatch.of(output["token_logprobs"], targets.rollout_logprobs, targets.sampled, cap)
    return torch.cat(
        [
            torch.stack([output[name].double() for name in METRICS]),
            mismatch.total,
            mismatch.largest.double()[None],
            gap_statistics(targets, output, config.kl),
            moments(targets, output),
        ]
    )


def combine(rows: Tensor) -> dict[str, float]:
    """Return the metrics of a step from the `statistics` [M, WIDTH] of its micro-batches.

    Means are weighted by tokens. Without any token they are 0, and ratios 1: nothing has moved.
    """
    own, mismatches, gaps, pairs = rows.split(_GROUPS, 1)
    found = dict(zip(METRICS, own.unbind(1), strict=True))
    tokens = found["tokens"]
    weights = tokens / tokens.sum().clamp(min=1)
    result = {name: float((found[name] * weights).sum()) for name in _MEANS}
    if not len(rows):
        result["ratio_mean"] = 1.0
    result["ratio_max"] = max(found["ratio_max"].tolist(), default=1.0)
    result["tokens"] = int(tokens.sum())
    result["nonfinite"] = int(found["nonfinite"].sum())
    nothing = Mismatch(torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    mismatch = functools.reduce(
        operator.add, (Mismatch(row[:4], row[4]) for row in mismatches), nothing
    )
    return {
        **result,
        **mismatch.metrics(),
        **gap_metrics(gaps),
        "logprob_advantage_covariance": covariance(pairs),
    }


def gap_statistics(targets: Targets, output: dict[str, Tensor], kl: str) -> Tensor:
    """Return what `gap_metrics` needs of a micro-batch, float64 [4]; zeros without a reference."""
    if targets.ref_logprobs is None or not targets.loss_mask.any():
        return torch.zeros(4, dtype=torch.float64)
    gaps = (targets.ref_logprobs - output["token_logprobs"])[targets.loss_mask].double()
    weights = {"k1": torch.ones_like(gaps), "k2": gaps, "k3": gaps.expm1()}[kl]
    counted = torch.where(gaps.abs() > LOG_RATIO_LIMIT, 0.0, weights)
    high = (gaps.abs() > HIGH_GAP).double().sum()
    count = high.new_tensor(len(gaps))
    return torch.stack([count, high, gaps.abs().max(), counted.abs().max()])


def gap_metrics(rows: Tensor) -> dict[str, float]:
    """Return how far the policy is from the reference, token by token; without one: {}.

    ref_gap_max: the largest |ref_logprob - logprob| in nats. ref_gap_share: the share of tokens
    where it is above `HIGH_GAP`. kl_weight_max: the largest derivative of a token's KL estimate by
    its log-prob, in absolute value.

    Args:
        rows: `gap_statistics` [M, 4] of the micro-batches.
    """
    tokens, high = rows[:, 0].sum(), rows[:, 1].sum()
    if not tokens:
        return {}
    return {
        "ref_gap_max": float(rows[:, 2].max()),
        "ref_gap_share": float(high / tokens),
        "kl_weight_max": float(rows[:, 3].max()),
    }


def moments(targets: Targets, output: dict[str, Tensor]) -> Tensor:
    """Return what `covariance` needs of a micro-batch, float64 [4]."""
    mask = targets.loss_mask
    logprobs = output["token_logprobs"][mask].double()
    advantages = targets.advantages[:, None].expand_as(mask)[mask].double()
    count = logprobs.new_tensor(len(logprobs))
    return torch.stack([count, logprobs.sum(), advantages.sum(), (logprobs * advantages).sum()])


def covariance(rows: Tensor) -> float:
    """Return the covariance over tokens of log-prob and advantage.

    Where it is high, the tokens that a step makes likelier are likely already, and the entropy
    falls (G. Cui et al., "The entropy mechanism of RL for reasoning language models", 2025).

    Args:
        rows: `moments` [M, 4] of the micro-batches.
    """
    count, logprobs, advantages, products = rows.sum(0).tolist()
    return (products - logprobs * advantages / count) / count if count else 0.0
