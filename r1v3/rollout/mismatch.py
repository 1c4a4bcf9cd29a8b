"""The gap between the policy that sampled and the policy that trains, and a correction for it.

Inference engines round differently from the trainer (other kernels, other batch shapes, weights of
an earlier step), so that the log-probs of the same tokens differ. The metrics measure by how much.
Truncated importance weights multiply the loss of a token by its probability ratio (Yao et al.,
"Your efficient RL framework secretly brings you off-policy RL training", 2025).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# As in the loss: the ratio of a token neither overflows nor underflows.
MAX_LOG_RATIO = 20.0


def _log_ratio(train: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
    if not train.shape == rollout.shape == mask.shape:
        raise ValueError(
            f"train_logprobs {tuple(train.shape)}, rollout_logprobs {tuple(rollout.shape)} and "
            f"mask {tuple(mask.shape)} must have one shape"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")
    wide = torch.promote_types(train.dtype, torch.float32)
    difference = train.detach().to(wide) - rollout.detach().to(train.device, wide)
    # Selected, not multiplied: what is masked may be NaN.
    return torch.where(mask, difference, 0.0)


def importance_weights(
    train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float
) -> Tensor:
    """Return min(exp(train - rollout), cap) per token, one where the mask is False; no gradient.

    Args:
        train_logprobs, rollout_logprobs: [...], in nats, of the same tokens.
        mask: bool [...], True at tokens that were sampled and count. A forced token was not drawn
            from the rollout policy and has no ratio.
        cap: at least 1.
    Returns:
        [...] float32, or float64 for float64 input; NaN where a counted log-prob is NaN.
    Raises:
        ValueError: shapes differ, the mask is not bool, or cap < 1.
    """
    if not cap >= 1:
        raise ValueError(f"cap {cap!r} must be at least 1, or every token would be weighed down")
    ratio = _log_ratio(train_logprobs, rollout_logprobs, mask)
    return ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)


@dataclass(frozen=True)
class Mismatch:
    """Sums over tokens, which add up over micro-batches; see `metrics`.

    Attributes:
        total: float64 [4], the number of tokens, the sums of |d| and of the KL estimate, and the
            number of tokens above the cap. d is the training minus the rollout log-prob.
        largest: scalar, the largest |d|.
    """

    total: Tensor
    largest: Tensor

    @classmethod
    def of(
        cls, train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float
    ) -> "Mismatch":
        """Measure the tokens of a mask; arguments and errors as for `importance_weights`."""
        if not cap >= 1:
            raise ValueError(f"cap {cap!r} must be at least 1")
        ratio = _log_ratio(train_logprobs.double(), rollout_logprobs.double(), mask)
        bounded = ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        # KL(rollout || train) under the rollout's own samples: unbiased and never negative.
        kl = torch.expm1(bounded) - bounded
        above = (bounded.exp() > cap) & mask
        sums = [mask.sum(), ratio.abs().sum(), kl.sum(), above.sum()]
        largest = ratio.abs().amax() if ratio.numel() else ratio.new_zeros(())
        return cls(torch.stack([s.double() for s in sums]), largest)

    def __add__(self, other: "Mismatch") -> "Mismatch":
        return Mismatch(self.total + other.total, torch.maximum(self.largest, other.largest))

    def metrics(self) -> dict[str, float]:
        """Return means over the counted tokens, zero for none; synchronizes with the device.

        rollout_gap: mean |d| in nats; rollout_gap_max: the largest; rollout_kl: estimate of
        KL(rollout || train) in nats; rollout_capped: fraction of tokens whose weight is cut.
        """
        tokens, gap, kl, above = (float(value) for value in self.total)
        count = max(1.0, tokens)
        return {
            "rollout_gap": gap / count,
            "rollout_gap_max": float(self.largest),
            "rollout_kl": kl / count,
            "rollout_capped": above / count,
        }
