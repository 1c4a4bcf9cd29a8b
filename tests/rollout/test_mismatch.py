"""Importance weights and mismatch metrics against float64, written out token by token."""

import math

import pytest
import torch

from r1v3.rollout.mismatch import Mismatch, importance_weights

CAP = 1.5


def some_logprobs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    train = -torch.rand(6, 9) * 3
    rollout = train + 0.5 * torch.randn(6, 9)
    mask = torch.rand(6, 9) < 0.7
    rollout[~mask] = math.nan
    return train, rollout, mask


def test_weights_are_truncated_ratios_and_one_where_masked() -> None:
    train, rollout, mask = some_logprobs()
    train.requires_grad_()
    weights = importance_weights(train, rollout, mask, CAP)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    train = train.detach()
    for row in range(6):
        for t in range(9):
            true = 1.0
            if mask[row, t]:
                true = min(math.exp(float(train[row, t]) - float(rollout[row, t])), CAP)
            assert float(weights[row, t]) == pytest.approx(true, rel=1e-6)
    assert (weights == CAP).any() and (weights[mask] < 1).any()


def test_far_apart_log_probs_neither_overflow_nor_vanish() -> None:
    train, rollout = torch.tensor([0.0, -3000.0]), torch.tensor([-3000.0, 0.0])
    weights = importance_weights(train, rollout, torch.ones(2, dtype=torch.bool), math.inf)
    assert weights.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_bfloat16_is_not_subtracted_as_bfloat16() -> None:
    train = torch.tensor([-2.0], dtype=torch.bfloat16)
    weights = importance_weights(train, torch.tensor([-2.001]), torch.tensor([True]), 2.0)
    assert float(weights) == pytest.approx(math.exp(0.001), rel=1e-6)


def test_metrics_are_the_written_out_means_however_the_tokens_are_split() -> None:
    train, rollout, mask = some_logprobs()
    gaps = (train.double() - rollout.double())[mask].tolist()
    true = {
        "rollout_gap": sum(abs(d) for d in gaps) / len(gaps),
        "rollout_gap_max": max(abs(d) for d in gaps),
        "rollout_kl": sum(math.exp(d) - 1 - d for d in gaps) / len(gaps),
        "rollout_capped": sum(math.exp(d) > CAP for d in gaps) / len(gaps),
    }
    assert true["rollout_capped"] > 0
    whole = Mismatch.of(train, rollout, mask, CAP).metrics()
    parts = [Mismatch.of(train[i:j], rollout[i:j], mask[i:j], CAP) for i, j in ((0, 1), (1, 6))]
    assert whole == pytest.approx(true, rel=1e-12)
    assert (parts[0] + parts[1]).metrics() == pytest.approx(true, rel=1e-12)


def test_the_kl_estimate_is_right_on_average() -> None:
    """Under samples of the rollout policy its mean is KL(rollout || train)."""
    torch.manual_seed(1)
    p, q = (torch.log_softmax(torch.randn(5, dtype=torch.float64), -1) for _ in range(2))
    true = float((p.exp() * (p - q)).sum())
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True)
    found = Mismatch.of(q[drawn], p[drawn], torch.ones_like(drawn, dtype=torch.bool), 2.0)
    assert found.metrics()["rollout_kl"] == pytest.approx(true, rel=0.02)


def test_no_tokens_give_zeros_and_a_counted_nan_shows() -> None:
    train, rollout, mask = some_logprobs()
    nothing = Mismatch.of(train, rollout, torch.zeros_like(mask), CAP).metrics()
    assert set(nothing.values()) == {0.0}
    empty = torch.zeros(0, 4)
    assert Mismatch.of(empty, empty, empty.bool(), CAP).metrics() == nothing
    everything = torch.ones_like(mask)
    assert math.isnan(Mismatch.of(train, rollout, everything, CAP).metrics()["rollout_gap"])
    assert importance_weights(train, rollout, everything, CAP)[~mask].isnan().all()


@pytest.mark.parametrize("cap", [0.5, -1.0, math.nan])
def test_a_cap_below_one_is_refused(cap: float) -> None:
    train, rollout, mask = some_logprobs()
    with pytest.raises(ValueError, match="must be at least 1"):
        importance_weights(train, rollout, mask, cap)
    with pytest.raises(ValueError, match="must be at least 1"):
        Mismatch.of(train, rollout, mask, cap)


def test_shapes_and_the_kind_of_mask_are_checked() -> None:
    train, rollout, mask = some_logprobs()
    with pytest.raises(ValueError, match=r"mask \(6, 8\) must have one shape"):
        importance_weights(train, rollout, mask[:, :8], CAP)
    with pytest.raises(ValueError, match="mask must be bool, not torch.float32"):
        importance_weights(train, rollout, mask.float(), CAP)
