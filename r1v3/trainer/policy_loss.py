"""The loss of a policy step on micro-batches, and its metrics (report eq. 4, 5 and 7)."""

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from r1v3.config import PolicyLoss
from r1v3.data.batch import Batch
from r1v3.engine.head import Head
from r1v3.kernels import grpo_loss
from r1v3.rollout.contract import Rollout
from r1v3.rollout.mismatch import Mismatch, importance_weights


@dataclass(frozen=True)
class Targets:
    """What the N responses of a micro-batch are trained against.

    Attributes:
        loss_mask: bool [N, R].
        advantages: float32 [N].
        behaviour: float32 [N, R], log-probs of the sampler.
        sampled: bool [N, R], tokens that count and were drawn from it, not forced.
        old: float32 [N, R], log-probs of the policy that ratios are taken to; None: the current.
        reference: float32 [N, R], log-probs of the policy that the KL term pulls to, or None.
    """

    loss_mask: Tensor
    advantages: Tensor
    behaviour: Tensor
    sampled: Tensor
    old: Tensor | None
    reference: Tensor | None

    @classmethod
    def of(
        cls,
        batch: Batch,
        first: int,
        advantages: Tensor,
        rollout: Rollout,
        old: Tensor | None,
        reference: Tensor | None,
    ) -> "Targets":
        """Those of a batch whose first response is row `first` of the episode."""
        rows, width = slice(first, first + len(batch.response_ids)), batch.response_ids.shape[1]
        return cls(
            batch.loss_mask,
            advantages[rows],
            rollout.logprobs[rows, :width],
            batch.loss_mask & rollout.sampled[rows, :width],
            None if old is None else old[rows, :width],
            reference,
        )

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)


class PolicyLossFn:
    """A `contract.LossFn`: the clipped loss of micro-batch i against `targets[i]`."""

    def __init__(self, config: PolicyLoss, targets: Sequence[Targets], normalizer: float) -> None:
        self.targets = targets
        self.importance_cap = config.importance_cap
        self.options: dict[str, Any] = {
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "dual_clip": config.dual_clip,
            "kl_coef": config.kl_coef,
            "kl": config.kl,
            "aggregation": config.aggregation,
            "normalizer": normalizer,
        }

    def __call__(self, head: Head, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `contract.LossFn`; hands back the metrics, with token log-probs and entropies."""
        targets = self.targets[index].to(head.hidden.device)
        if self.importance_cap is None:
            return head.grpo_loss(
                targets.old, targets.advantages, ref_logprobs=targets.reference, **self.options
            )
        # The weights need the log-probs before the loss: two passes over the head.
        return self._separately(*head.logprobs_and_entropy(), targets)

    def metrics(self, logprobs: Tensor, entropy: Tensor, index: int) -> dict[str, Tensor]:
        """What `__call__` would hand back for these log-probs and entropies [N, R]."""
        return self._separately(logprobs, entropy, self.targets[index])[1]

    def _separately(
        self, logprobs: Tensor, entropy: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = None
        if self.importance_cap is not None:
            old = logprobs.detach() if targets.old is None else targets.old
            weights = importance_weights(
                old, targets.behaviour, targets.sampled, self.importance_cap
            )
        loss, metrics = grpo_loss(
            logprobs,
            targets.old,
            targets.advantages,
            targets.loss_mask,
            ref_logprobs=targets.reference,
            weights=weights,
            **self.options,
        )
        tokens = {"token_logprobs": logprobs.detach(), "token_entropy": entropy.detach()}
        return loss, {**metrics, **tokens}


def normalizer(
    config: PolicyLoss, batches: Sequence[Batch], sequences: int, max_tokens: int
) -> float:
    """What the summed loss of a whole gradient step is divided by."""
    if config.aggregation == "token-mean":
        return float(sum(int(batch.loss_mask.sum()) for batch in batches))
    if config.aggregation == "constant":
        return float(sequences * max_tokens)
    return float(sequences)


def combine(
    targets: Sequence[Targets],
    outputs: Sequence[dict[str, Tensor]],
    importance_cap: float | None = None,
) -> dict[str, float]:
    """Metrics of a step from those of its micro-batches, weighted by their tokens."""
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
        Mismatch.of(output["token_logprobs"], target.behaviour, target.sampled, cap)
        for output, target in zip(outputs, targets, strict=True)
    ]
    return {**result, **functools.reduce(operator.add, mismatches).metrics()}
