"""The clipped policy loss, on every implementation this process can run."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.kernels import grpo_loss, reference
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import CPU_BACKENDS, INTERPRETED, slow_interpreted
from tests.kernels.tokens import AGGREGATIONS, random_batch

pytestmark = pytest.mark.usefixtures("backend")


def by_hand() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sequences; the ratios of the valid tokens are 1.5, 1.1, 0.5 | 0.5, 3.0."""
    old = torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -3.0, 0.0]])
    ratio = torch.tensor([[1.5, 1.1, 0.5], [0.5, 3.0, 1.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return old + ratio.log(), old, torch.tensor([2.0, -1.0]), mask


def test_report_equations_4_5_and_7_by_hand() -> None:
    """Fails if ratio, clipping or the two means differ from the report's.

    A = 2: min(1.5 * 2, 1.2 * 2) = 2.4, min(2.2, 2.2) = 2.2, min(1.0, 1.6) = 1.0: mean 5.6 / 3.
    A = -1: min(-0.5, -0.8) = -0.8, min(-3.0, -1.2) = -3.0: mean -1.9.
    Loss = -(5.6 / 3 - 1.9) / 2; the gradient is -A r / length / 2 where unclipped, else 0.
    """
    logprobs, old, advantages, mask = by_hand()
    logprobs.requires_grad_()
    loss, metrics = grpo_loss(logprobs, old, advantages, mask)
    torch.testing.assert_close(loss, torch.tensor(-(5.6 / 3 - 1.9) / 2))
    loss.backward()
    expected = torch.tensor([[0.0, -2.2 / 6, -1.0 / 6], [0.0, 3.0 / 4, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected)
    values = {
        "clip_low_fraction": 1 / 5,
        "clip_high_fraction": 1 / 5,
        "dual_clip_fraction": 0.0,
        "approx_kl": -(math.log(1.5) + math.log(1.1) + 2 * math.log(0.5) + math.log(3)) / 5,
        "ref_kl": 0.0,
        "ratio_mean": 6.6 / 5,
        "ratio_max": 3.0,
        "tokens": 5.0,
        "nonfinite": 0.0,
    }
    assert list(metrics) == list(values)
    for name, value in values.items():
        torch.testing.assert_close(metrics[name], torch.tensor(value), msg=name)
        assert metrics[name].dim() == 0 and not metrics[name].requires_grad


def test_aggregations_by_hand() -> None:
    """Fails if a normalizer is another one. Token losses: -2.4, -2.2, -1.0 and 0.8, 3.0."""
    inputs = by_hand()
    expected = {
        "token-mean": -1.8 / 5,
        "sequence-sum": -1.8 / 2,
        "constant": -1.8 / 7,
    }
    for aggregation, value in expected.items():
        normalizer = 7.0 if aggregation == "constant" else None
        loss, _ = grpo_loss(*inputs, aggregation=aggregation, normalizer=normalizer)
        torch.testing.assert_close(loss, torch.tensor(value))


def test_clip_higher_dual_clip_and_weights_by_hand() -> None:
    """Fails if the bounds are swapped, or the weight multiplies something else.

    clip_high 0.6: min(3.0, 3.2) = 3.0; dual clip 2: max(-3.0, -2.0) = -2.0 for A = -1.
    """
    inputs = by_hand()
    loss, metrics = grpo_loss(*inputs, clip_high=0.6, dual_clip=2.0, aggregation="token-mean")
    torch.testing.assert_close(loss, torch.tensor(-(3.0 + 2.2 + 1.0 - 0.8 - 2.0) / 5))
    assert metrics["clip_high_fraction"] == 0
    torch.testing.assert_close(metrics["dual_clip_fraction"], torch.tensor(0.2))
    weights = torch.tensor([0.5, 2.0])
    loss, _ = grpo_loss(*inputs, weights=weights, aggregation="token-mean")
    torch.testing.assert_close(loss, torch.tensor((-5.6 * 0.5 + 3.8 * 2) / 5))
    per_token, _ = grpo_loss(
        *inputs, weights=weights[:, None].expand(2, 3), aggregation="token-mean"
    )
    assert torch.equal(per_token, loss)


def test_cispo_by_hand() -> None:
    """Fails if the clipped ratio gets a gradient, or a token outside the bounds loses its own.

    Bounds 0.8 and 1.2: ratios 1.2, 1.1, 0.8 for A = 2, and 0.8, 1.2 for A = -1. The loss is the
    sum of -ratio * A * logprob, its derivative -ratio * A.
    """
    logprobs, old, advantages, mask = by_hand()
    logprobs.requires_grad_()
    slopes = torch.tensor([[-2.4, -2.2, -1.6], [0.8, 1.2, 0.0]]) / 5
    loss, metrics = grpo_loss(
        logprobs, old, advantages, mask, ratio_clip="cispo", aggregation="token-mean"
    )
    torch.testing.assert_close(loss, (slopes * logprobs).sum())
    loss.backward()
    torch.testing.assert_close(logprobs.grad, slopes)
    # Whatever the sign of the advantage: 1.5 and 3.0 are above, 0.5 and 0.5 below.
    for name, value in {"clip_low_fraction": 0.4, "clip_high_fraction": 0.4}.items():
        torch.testing.assert_close(metrics[name], torch.tensor(value))
    assert metrics["dual_clip_fraction"] == 0
    torch.testing.assert_close(metrics["ratio_max"], torch.tensor(3.0))
    unbounded = logprobs.detach().requires_grad_()
    loss, metrics = grpo_loss(
        unbounded, old, advantages, mask, ratio_clip="cispo", clip_low=1.0,
        aggregation="token-mean",
    )  # fmt: skip
    loss.backward()
    expected = torch.tensor([[-2.4, -2.2, -1.0], [0.5, 1.2, 0.0]]) / 5
    torch.testing.assert_close(unbounded.grad, expected)
    assert metrics["clip_low_fraction"] == 0


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl_by_hand(kl: str) -> None:
    """Fails if an estimator or its gradient is another one: logprob - ref = log 2 and -log 2."""
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    ref = torch.tensor([[-1.0 - math.log(2), -1.0 + math.log(2)]])
    loss, metrics = grpo_loss(
        logprobs, None, torch.zeros(1), torch.ones(1, 2), ref_logprobs=ref, kl_coef=0.5, kl=kl
    )
    log2 = math.log(2)
    value = {"k1": 0.0, "k2": log2**2 / 2, "k3": (0.5 + log2 - 1 + 2 - log2 - 1) / 2}[kl]
    slopes = {"k1": [1.0, 1.0], "k2": [log2, -log2], "k3": [0.5, -1.0]}[kl]
    torch.testing.assert_close(metrics["ref_kl"], torch.tensor(value))
    torch.testing.assert_close(loss, torch.tensor(0.5 * value))
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([slopes]) * 0.25)


def test_unbiased_kl_by_hand() -> None:
    """Fails if the ratio does not multiply the KL, or one of its two factors gets no gradient.

    Ratios 1.5, 1.1, 0.5 | 0.5, 3.0, and the policy is twice as likely as the reference: k3 is
    k = 0.5 + log 2 - 1 with the derivative 0.5, so that the derivative of r k is r (0.5 + k).
    """
    logprobs, old, _, mask = by_hand()
    logprobs.requires_grad_()
    loss, metrics = grpo_loss(
        logprobs, old, torch.zeros(2), mask, ref_logprobs=logprobs.detach() - math.log(2),
        kl_coef=0.1, unbiased_kl=True, aggregation="token-mean",
    )  # fmt: skip
    loss.backward()
    k3 = math.log(2) - 0.5
    torch.testing.assert_close(metrics["ref_kl"], torch.tensor(6.6 * k3 / 5))
    torch.testing.assert_close(loss.detach(), torch.tensor(0.1 * 6.6 * k3 / 5))
    ratio = torch.tensor([[1.5, 1.1, 0.5], [0.5, 3.0, 0.0]])
    torch.testing.assert_close(logprobs.grad, 0.1 * ratio * (0.5 + k3) / 5)


@pytest.mark.skipif(INTERPRETED, reason="float64 is the reference's")
@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_unbiased_kl_is_the_kl(kl: str) -> None:
    """Fails if the mean over tokens that another policy sampled is not the KL, or its gradient."""
    theta, other, fixed = torch.randn(3, 6, dtype=torch.float64)
    theta.requires_grad_()
    policy, sampler, ref = (x.log_softmax(-1) for x in (theta, other, fixed))
    exact = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), theta)[0]
    losses, _ = grpo_loss(
        theta.log_softmax(-1)[None], sampler[None], torch.zeros(1), torch.ones(1, 6),
        ref_logprobs=ref[None], kl_coef=1.0, kl=kl, unbiased_kl=True, aggregation="none",
    )  # fmt: skip
    mean = (sampler.exp() * losses[0]).sum()
    torch.testing.assert_close(mean, (policy.exp() * (policy - ref)).sum())
    torch.testing.assert_close(torch.autograd.grad(mean, theta)[0], exact)


TOKEN_OPTIONS: list[dict[str, Any]] = [
    {"ratio_clip": "cispo", "kl_coef": 0.1},
    {"kl_coef": 0.1, "dual_clip": 1.5},
    {},
]


@pytest.mark.parametrize(
    "options,packed",
    [
        pytest.param(options, packed, marks=[slow_interpreted] if index and not packed else [])
        for index, options in enumerate(TOKEN_OPTIONS)
        for packed in (False, True)
    ],
)
def test_losses_of_tokens(options: dict[str, Any], packed: bool) -> None:
    """Fails if a token's loss or gradient is not its term of the sum, or a masked one counts."""
    logprobs, old, advantages, mask = random_batch()
    ref = old + 0.1
    layout: dict[str, Any] = {}
    if packed:  # the last tokens are in no sequence
        logprobs, old, ref, mask = (x.reshape(-1)[:1500] for x in (logprobs, old, ref, mask))
        advantages, layout = advantages[:2], {"cu_seqlens": torch.tensor([0, 700, 1490])}
    logprobs[mask == 0] = math.nan
    given = {"ref_logprobs": ref, "weights": advantages.abs(), **options, **layout}
    results = []
    for aggregation, normalizer in (("none", None), ("constant", 1.0)):
        leaf = logprobs.clone().requires_grad_()
        loss, metrics = grpo_loss(
            leaf, old, advantages, mask, aggregation=aggregation, normalizer=normalizer, **given
        )
        upstream = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
        (loss * upstream).sum().backward() if aggregation == "none" else loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    (losses, gradient, metrics), (total, whole, metrics2) = results
    assert losses.shape == logprobs.shape
    counted = (mask != 0) if not packed else (mask != 0) & (torch.arange(1500) < 1490)
    assert (losses[~counted] == 0).all() and losses[counted].isfinite().all()
    torch.testing.assert_close(losses.double().sum().float(), total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, whole * upstream)
    for name, value in metrics.items():
        torch.testing.assert_close(metrics2[name], value)
    one = counted.nonzero()[3]
    alone = torch.zeros_like(mask)
    alone[tuple(one)] = 1
    single, _ = grpo_loss(
        logprobs, old, advantages, alone, aggregation="constant", normalizer=1.0, **given
    )
    torch.testing.assert_close(losses[tuple(one)], single)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_high": 0.28, "dual_clip": 1.5, "aggregation": "token-mean"},
    {"kl_coef": 0.1, "kl": "k3", "aggregation": "sequence-sum"},
    {"kl_coef": 0.1, "kl": "k1", "aggregation": "constant", "normalizer": 1000.0},
    {"kl_coef": 0.3, "kl": "k2", "normalizer": 4},
    {"kl_coef": 0.1, "kl": "k3", "unbiased_kl": True, "aggregation": "token-mean"},
]
CISPO: list[dict[str, Any]] = [
    {"ratio_clip": "cispo"},
    {"ratio_clip": "cispo", "clip_low": 1.0, "clip_high": 0.28, "aggregation": "token-mean",
     "kl_coef": 0.1},
]  # fmt: skip


@pytest.mark.parametrize(
    "options,per_token",
    [
        pytest.param(options, per_token, marks=[slow_interpreted] if index % 2 == per_token else [])
        for index, options in enumerate(OPTIONS + CISPO)
        for per_token in (False, True)
    ],
)
def test_matches_float64(options: dict[str, Any], per_token: bool) -> None:
    """Fails if loss, gradient or a metric is less accurate than float32 PyTorch allows."""
    inputs = random_batch()
    ref = inputs[0] + 0.2 * torch.randn(6, 1100)
    weights = torch.rand(6)
    if per_token:
        inputs = (*inputs[:2], torch.randn(6, 1100), inputs[3])
        weights = torch.rand(6, 1100)
    got = evaluate(grpo_loss, inputs, ref, weights, options, torch.float32)
    truth = evaluate(specification, inputs, ref, weights, options, torch.float64)
    plain = evaluate(specification, inputs, ref, weights, options, torch.float32)
    for name, g, t, p in zip(("loss", "gradient", "metrics"), got, truth, plain, strict=True):
        assert_within_budget(name, g, t, p, 1e-6)


def evaluate(
    function: Any,
    inputs: tuple[Tensor, ...],
    ref: Tensor,
    weights: Tensor,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, old, advantages = (x.to(dtype) for x in inputs[:3])
    logprobs = logprobs.clone().requires_grad_()
    loss, metrics = function(
        logprobs, old, advantages, inputs[3], ref_logprobs=ref.to(dtype),
        weights=weights.to(dtype), **options,
    )  # fmt: skip
    loss.backward()
    values = torch.stack(list(metrics.values())) if isinstance(metrics, dict) else metrics
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad, values


def specification(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The reference through autograd, not through its own closed-form gradient."""
    offsets = torch.arange(logprobs.shape[0] + 1) * logprobs.shape[1]
    flat = {k: v.reshape(-1) if isinstance(v, Tensor) else v for k, v in options.items()}
    loss, _, metrics = reference.grpo_loss(
        logprobs.reshape(-1), old.reshape(-1), advantages.reshape(-1), mask.reshape(-1), offsets,
        **flat,
    )  # fmt: skip
    return loss, metrics


def test_gradcheck() -> None:
    """Fails if the closed-form gradient is not the derivative of the loss."""
    logprobs, old, advantages, _ = random_batch(torch.float64)
    few = (slice(0, 3), slice(0, 7))
    mask = torch.rand(3, 7) < 0.8
    ref = logprobs[few] + 0.1
    for options in [*OPTIONS, {"aggregation": "none", "kl_coef": 0.2, "unbiased_kl": True}]:
        x = logprobs[few].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, options=options: grpo_loss(
                x, old[few], advantages[:3], mask, ref_logprobs=ref, **options
            )[0],
            (x,),
        )


@pytest.mark.parametrize("options", CISPO)
def test_cispo_is_the_derivative_of_the_loss_with_the_clipped_ratio_frozen(
    options: dict[str, Any],
) -> None:
    """Fails if the gradient is not that of -clip(r) A logprob, clip(r) taken as a number."""
    logprobs, old, advantages, _ = random_batch(torch.float64)
    few = (slice(0, 3), slice(0, 7))
    new, old, a = logprobs[few], old[few], advantages[:3, None]
    mask = torch.rand(3, 7) < 0.8
    options = {**options, "aggregation": "constant", "normalizer": 1.0, "kl_coef": 0.1}
    ratio = (new - old).exp()
    bounds = 1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.2)
    assert (ratio < bounds[0]).any() != (bounds[0] == 0) and (ratio > bounds[1]).any()
    frozen, ref = ratio.clamp(*bounds), new + 0.1

    def surrogate(x: Tensor) -> Tensor:
        gap = ref - x
        return (mask * (-frozen * a * x + 0.1 * (gap.exp() - 1 - gap))).sum()

    x = new.clone().requires_grad_()
    loss, _ = grpo_loss(x, old, advantages[:3], mask, ref_logprobs=ref, **options)
    loss.backward()
    torch.testing.assert_close(loss.detach(), surrogate(new))
    step = 1e-5
    for token in range(new.numel()):
        shift = torch.zeros_like(new)
        shift.view(-1)[token] = step
        slope = (surrogate(new + shift) - surrogate(new - shift)) / (2 * step)
        torch.testing.assert_close(x.grad.view(-1)[token], slope, rtol=1e-7, atol=1e-9)


def test_cispo_gradcheck() -> None:
    """Fails if, where the ratio is a constant, the gradient is not the derivative of the loss."""
    logprobs, old, advantages, _ = random_batch(torch.float64)
    few = (slice(0, 3), slice(0, 7))
    mask = torch.rand(3, 7) < 0.8
    on_policy = {"clip_low": 1.0, "clip_high": 4.0}
    empty_range = {"clip_low": 0.0, "clip_high": 0.0}
    for sampled, bounds in ((None, on_policy), (old[few], empty_range)):
        x = logprobs[few].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, sampled=sampled, bounds=bounds: grpo_loss(
                x, sampled, advantages[:3], mask, ref_logprobs=logprobs[few] + 0.1, kl_coef=0.1,
                ratio_clip="cispo", **bounds,
            )[0],
            (x,),
        )  # fmt: skip


@pytest.mark.parametrize("clip_low", [0.2, 1.0])
def test_cispo_never_takes_a_gradient_away(clip_low: float) -> None:
    """Fails if a ratio outside the bounds, beyond the clamp of +-20 too, gives another slope."""
    gaps = torch.tensor([-30.0, -19.0, -1.0, -0.1, 0.0, 0.1, 1.0, 19.0, 30.0])
    advantages = torch.tensor([[-1.5], [2.0]]).expand(2, 9)
    logprobs = (-0.5 - torch.rand(2, 9)).requires_grad_()
    loss, metrics = grpo_loss(
        logprobs, logprobs.detach() - gaps, advantages, torch.ones(2, 9), clip_low=clip_low,
        clip_high=0.28, ratio_clip="cispo", aggregation="constant", normalizer=1.0,
    )  # fmt: skip
    loss.backward()
    low = 1 - clip_low
    inside = torch.tensor([-1.0, -0.1, 0.0, 0.1]).exp().clamp(min=low).tolist()
    tiny = [max(low, math.exp(-20.0)), max(low, math.exp(-19.0))]
    factor = torch.tensor([*tiny, *inside, 1.28, 1.28, 1.28])
    torch.testing.assert_close(logprobs.grad, -factor * advantages, rtol=1e-5, atol=0.0)
    assert (logprobs.grad != 0).all()
    torch.testing.assert_close(metrics["clip_high_fraction"], torch.tensor(3 / 9))
    assert metrics["clip_low_fraction"] == (torch.tensor(3 / 9) if clip_low < 1 else 0)


def test_packed_equals_padded() -> None:
    """Fails if packed sequences, an empty one among them, are aggregated differently."""
    logprobs, old, advantages, mask = random_batch()
    lengths = torch.tensor([1100, 3, 700, 0, 1099, 1050])
    inside = torch.arange(1100) < lengths[:, None]
    mask = mask & inside
    padded = logprobs.clone().requires_grad_()
    loss, metrics = grpo_loss(padded, old, advantages, mask)
    loss.backward()
    packed = logprobs[inside].clone().requires_grad_()
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)])
    loss2, metrics2 = grpo_loss(packed, old[inside], advantages, mask[inside], cu_seqlens=ends)
    loss2.backward()
    torch.testing.assert_close(loss2, loss)
    torch.testing.assert_close(packed.grad, padded.grad[inside])
    for name in metrics:
        torch.testing.assert_close(metrics2[name], metrics[name])


def test_tokens_after_the_last_sequence_do_not_count() -> None:
    """Fails if padding behind packed sequences enters the loss."""
    logprobs = torch.randn(10, requires_grad=True)
    ends = torch.tensor([0, 4, 7])
    loss, metrics = grpo_loss(
        logprobs, torch.randn(10), torch.randn(2), torch.ones(10), cu_seqlens=ends
    )
    loss.backward()
    assert metrics["tokens"] == 7 and (logprobs.grad[7:] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("as_tensor", [True] if INTERPRETED else [False, True])
def test_micro_batches_add_up(aggregation: str, as_tensor: bool) -> None:
    """Fails if splitting a batch with a global normalizer changes loss or gradient."""
    logprobs, old, advantages, mask = random_batch()
    total = {
        "sequence-mean": float(mask.any(-1).sum()),
        "sequence-sum": float(mask.any(-1).sum()),
        "token-mean": float(mask.sum()),
        "constant": 6 * 1100.0,
    }[aggregation]
    own = total if aggregation == "constant" else None
    whole = logprobs.clone().requires_grad_()
    loss, _ = grpo_loss(whole, old, advantages, mask, aggregation=aggregation, normalizer=own)
    loss.backward()
    split = logprobs.clone().requires_grad_()
    summed = torch.zeros(())
    for part in (slice(0, 1), slice(1, 3), slice(3, 6)):
        piece, _ = grpo_loss(
            split[part], old[part], advantages[part], mask[part], aggregation=aggregation,
            normalizer=torch.tensor(total) if as_tensor else total,
        )  # fmt: skip
        piece.backward()
        summed += piece.detach()
    torch.testing.assert_close(summed, loss.detach())
    torch.testing.assert_close(split.grad, whole.grad)


def test_on_policy() -> None:
    """Fails if old_logprobs None is not ratio 1 with the policy gradient -A / length / B."""
    logprobs = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    loss, metrics = grpo_loss(logprobs, None, torch.tensor([1.0, -3.0]), mask)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(1.0))
    expected = torch.tensor([[-0.125] * 4, [0.75, 0.75, 0.0, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1


def test_bits_are_the_same_on_every_run() -> None:
    """Fails if a reduction depends on timing."""
    inputs = random_batch()
    results = []
    for _ in range(3):
        x = inputs[0].clone().requires_grad_()
        loss, metrics = grpo_loss(x, *inputs[1:])
        (3 * loss).backward()
        results.append(
            torch.cat(
                [loss.detach()[None], x.grad.view(-1), *map(torch.atleast_1d, metrics.values())]
            )
        )
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("aggregation", ["sequence-mean", "constant"])
def test_a_sequence_does_not_depend_on_the_others(aggregation: str) -> None:
    """Fails if, with a global normalizer, the batch around a sequence changes a bit of its part."""
    inputs = random_batch()
    gradients = []
    for part in (slice(0, 6), slice(0, 1), slice(4, 6)):
        x = inputs[0][part].clone().requires_grad_()
        grpo_loss(
            x, *(value[part] for value in inputs[1:]), aggregation=aggregation, normalizer=6.0
        )[0].backward()
        gradients.append((part, x.grad))
    for part, alone in gradients[1:]:
        assert torch.equal(gradients[0][1][part], alone)


def test_wrong_arguments_raise(backend: str) -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    x, a, m = torch.randn(2, 3), torch.randn(2), torch.ones(2, 3)
    cases: list[tuple[Any, str]] = [
        (lambda: grpo_loss(x, x, torch.randn(3), m), r"advantages must have shape \[2\]"),
        (lambda: grpo_loss(x, x[:1], a, m), r"old_logprobs must have shape \[2, 3\]"),
        (lambda: grpo_loss(x, x, a, m[:, :2]), r"loss_mask must have shape \[2, 3\]"),
        (lambda: grpo_loss(x[0], x[0], a, m[0]), "together with cu_seqlens"),
        (lambda: grpo_loss(x, x, a, m, kl="k4"), "kl must be one of k1, k2, k3, got 'k4'"),
        (lambda: grpo_loss(x, x, a, m, aggregation="mean"), "aggregation must be one of"),
        (lambda: grpo_loss(x, x, a, m, aggregation="constant"), "needs a normalizer"),
        (lambda: grpo_loss(x, x, a, m, normalizer=0.0), "normalizer must be > 0, got 0.0"),
        (lambda: grpo_loss(x, x, a, m, aggregation="none", normalizer=2.0), "must be None"),
        (lambda: grpo_loss(x, x, a, m, clip_low=-0.1), "clip_low=-0.1"),
        (lambda: grpo_loss(x, x, a, m, dual_clip=0.9), "dual_clip must be > 1"),
        (lambda: grpo_loss(x, x, a, m, ratio_clip="gspo"), "ratio_clip must be one of ppo, cispo"),
        (lambda: grpo_loss(x, x, a, m, ratio_clip="cispo", dual_clip=3.0), 'dual_clip .*"cispo"'),
    ]
    if backend in CPU_BACKENDS:
        ends = torch.tensor([0, 5, 4])
        cases.append(
            (lambda: grpo_loss(x.view(-1), None, a, m.view(-1), cu_seqlens=ends), "cu_seqlens")
        )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
