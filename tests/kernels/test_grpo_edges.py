"""The clipped policy loss of masked, overflowing, broken and missing tokens."""
# mypy: disable-error-code="arg-type,union-attr,index"

import itertools
import math
from typing import Any

import pytest
import torch

from r1v3.kernels import grpo_loss, reference
from tests.kernels.conftest import slow_interpreted
from tests.kernels.tokens import AGGREGATIONS, random_batch

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("ratio_clip", ["ppo", "cispo"])
@pytest.mark.parametrize(
    "bad",
    [
        math.nan,
        pytest.param(math.inf, marks=slow_interpreted),
        pytest.param(-math.inf, marks=slow_interpreted),
    ],
)
def test_masked_tokens_cannot_leak(bad: float, ratio_clip: str) -> None:
    """Fails if whatever stands at a masked token changes a bit of the result."""
    logprobs, old, _, mask = random_batch()
    advantages, ref, weights = torch.randn(6, 1100), logprobs + 0.1, torch.rand(6, 1100)
    results = []
    for value in (0.0, bad):
        filled = [torch.where(mask, x, value) for x in (logprobs, old, advantages, ref, weights)]
        x = filled[0].requires_grad_()
        loss, metrics = grpo_loss(
            x, filled[1], filled[2], mask, ref_logprobs=filled[3], weights=filled[4], kl_coef=0.1,
            ratio_clip=ratio_clip,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), x.grad, torch.stack(list(metrics.values()))))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_masked(aggregation: str) -> None:
    """Fails if a batch without a valid token divides 0 by 0."""
    logprobs = torch.randn(3, 5, requires_grad=True)
    normalizer = 3.0 if aggregation == "constant" else None
    loss, metrics = grpo_loss(
        logprobs, None, torch.ones(3), torch.zeros(3, 5), aggregation=aggregation,
        normalizer=normalizer,
    )  # fmt: skip
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all()
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("gap", [200.0, -200.0, 1e30])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_stay_finite(gap: float, advantage: float) -> None:
    """Fails if exp(logprob - old) overflows in the loss, the gradient or a metric."""
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1.0 - gap, -1.0]])
    loss, metrics = grpo_loss(
        logprobs, old, torch.tensor([advantage]), torch.ones(1, 2), ref_logprobs=old, kl_coef=0.1
    )
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and logprobs.grad[0, 0] == 0
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["ratio_max"] <= math.exp(20) * 1.0001


@pytest.mark.parametrize(
    "policy", [{"dual_clip": None}, {"dual_clip": 3.0}, {"ratio_clip": "cispo"}]
)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_hostile_tokens_match_the_specification(kl: str, policy: dict[str, Any]) -> None:
    """Fails if a ratio or a KL that overflows, or is infinite or NaN, gets another gradient.

    Every combination of log-probability, old, reference and advantage is a token of its own.
    """
    hostile = [-1.0, -1.3, -31.0, -201.0, 199.0, 1e30, math.inf, -math.inf, math.nan]
    tokens = torch.tensor(list(itertools.product(hostile, hostile, hostile[::2], (-1.0, 0.0, 2.0))))
    new, old, ref, advantages = tokens.T[:, None]
    options = dict(kl_coef=0.1, kl=kl, aggregation="constant", normalizer=2.0, **policy)
    mask = torch.ones_like(new, dtype=torch.bool)
    leaf = new.clone().requires_grad_()
    loss, metrics = grpo_loss(leaf, old, advantages, mask, ref_logprobs=ref, **options)
    loss.backward()
    flat = (x.double().view(-1) for x in (new, old, advantages))
    _, gradient, exact = reference.grpo_loss(
        *flat, mask.view(-1), torch.tensor([0, mask.numel()]),
        ref_logprobs=ref.double().view(-1), **options,
    )  # fmt: skip
    torch.testing.assert_close(leaf.grad.view(-1).double(), gradient, equal_nan=True)
    got = torch.stack(list(metrics.values())).double()
    torch.testing.assert_close(got, exact, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    """Fails if a batch without sequences or tokens divides by zero, or does not run."""
    logprobs = torch.zeros(shape, requires_grad=True)
    ends = torch.tensor([0, 0]) if len(shape) == 1 else None
    sequences = 1 if ends is not None else shape[0]
    loss, metrics = grpo_loss(
        logprobs, logprobs.detach(), torch.ones(sequences), torch.ones(shape), cu_seqlens=ends
    )
    loss.backward()
    assert loss == 0 and logprobs.grad.shape == shape
    assert all(value == 0 for value in metrics.values())


def test_any_layout() -> None:
    """Fails if strides of the inputs are ignored."""
    inputs = [torch.randn(3, 7, 2)[..., 0] for _ in range(4)]
    mask = (torch.rand(7, 3) < 0.7).T
    results = []
    for dense in (True, False):
        logprobs, old, ref, weights = (x.clone() if dense else x for x in inputs)
        x = logprobs.detach().requires_grad_()
        loss, _ = grpo_loss(
            x, old, torch.arange(3.0).expand(7, 3).T, mask.contiguous() if dense else mask,
            ref_logprobs=ref, weights=weights, kl_coef=0.1,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("where", ["logprobs", "old", "advantages", "weights", "ref"])
def test_broken_valid_tokens_are_counted(where: str) -> None:
    """Fails if NaN at a valid token disappears: it must be counted and reach the loss."""
    tensors = {
        name: torch.randn(2, 4) for name in ("logprobs", "old", "advantages", "weights", "ref")
    }
    tensors[where][1, 2] = math.nan
    loss, metrics = grpo_loss(
        tensors["logprobs"], tensors["old"], tensors["advantages"], torch.ones(2, 4),
        weights=tensors["weights"], ref_logprobs=tensors["ref"], kl_coef=0.1,
    )  # fmt: skip
    assert metrics["nonfinite"] == 1 and loss.isnan()
    if where in ("logprobs", "old"):
        assert metrics["ratio_max"].isnan() and metrics["ratio_mean"].isnan()


def test_without_coefficient_the_reference_only_shows_in_the_metrics() -> None:
    """Fails if kl_coef 0 times a NaN of the reference model destroys the loss."""
    logprobs = torch.randn(1, 3, requires_grad=True)
    ref = torch.tensor([[math.nan, -1.0, -1.0]])
    loss, metrics = grpo_loss(logprobs, None, torch.ones(1), torch.ones(1, 3), ref_logprobs=ref)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
    assert metrics["nonfinite"] == 1
