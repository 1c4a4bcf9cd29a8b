"""The compiled CPU kernel of the GRPO loss."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3 import _C
from tests.kernels.compiled import CAPABILITIES, each_capability

RATIO_CLIPS = {"ppo": 0, "cispo": 1}
KLS = {"k1": 0, "k2": 1, "k3": 2}
AGGREGATIONS = {"sequence-mean": 0, "token-mean": 1, "sequence-sum": 2, "constant": 3}
NAMES = (
    "clip_low clip_high dual_clip approx_kl ref_kl ratio_mean ratio_max tokens nonfinite".split()
)


@dataclass
class Batch:
    """Packed sequences; per-token tensors are [N], offsets [S + 1]."""

    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor
    offsets: Tensor
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None


def make_batch(lengths: list[int], per_token: bool = False, spread: float = 0.3) -> Batch:
    n = sum(lengths)
    logprobs = -torch.rand(n) * 3
    return Batch(
        logprobs,
        logprobs + torch.randn(n) * spread,
        torch.randn(n if per_token else len(lengths)),
        (torch.rand(n) < 0.8).to(torch.uint8),
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        logprobs + torch.randn(n) * spread,
    )


def grpo_loss(
    batch: Batch,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 0.0,
    ratio_clip: str = "ppo",
    kl_coef: float = 0.0,
    kl: str = "k3",
    unbiased_kl: bool = False,
    aggregation: str = "sequence-mean",
    normalizer: float = 0.0,
    threads: int = 1,
    capability: str = "",
) -> tuple[float, Tensor, dict[str, float]]:
    n = batch.logprobs.shape[0]
    loss, grad, metrics = torch.empty(1), torch.full((n,), 777.0), torch.empty(9)
    address = {
        name: 0 if value is None else value.data_ptr() for name, value in vars(batch).items()
    }
    weights = batch.weights
    _C.grpo_loss(
        logprobs=address["logprobs"],
        n=n,
        old_logprobs=address["old_logprobs"],
        advantages=address["advantages"],
        advantage_is_per_token=batch.advantages.shape[0] == n,
        mask=address["mask"],
        ref_logprobs=address["ref_logprobs"],
        weights=address["weights"],
        weights_is_per_token=weights is not None and weights.shape[0] == n,
        seq_offsets=address["offsets"],
        n_seqs=batch.offsets.shape[0] - 1,
        normalizer=normalizer,
        options=[
            clip_low,
            clip_high,
            dual_clip,
            RATIO_CLIPS[ratio_clip],
            kl_coef,
            KLS[kl],
            unbiased_kl,
            AGGREGATIONS[aggregation],
        ],
        loss=loss.data_ptr(),
        grad=grad.data_ptr(),
        metrics=metrics.data_ptr(),
        num_threads=threads,
        capability=capability,
    )
    return loss.item(), grad, dict(zip(NAMES, metrics.tolist(), strict=True))


def autograd_loss(
    batch: Batch,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 0.0,
    ratio_clip: str = "ppo",
    kl_coef: float = 0.0,
    kl: str = "k3",
    unbiased_kl: bool = False,
    aggregation: str = "sequence-mean",
    normalizer: float = 0.0,
) -> tuple[float, Tensor]:
    """The loss sequence by sequence in float64, and its gradient from autograd."""
    x = batch.logprobs.double().requires_grad_()
    per_sequence, lengths = [], []
    bounds = batch.offsets.tolist()
    for s, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        keep = batch.mask[start:end] != 0
        if not keep.any():
            continue

        def pick(
            values: Tensor, start: int = start, end: int = end, s: int = s, keep: Tensor = keep
        ) -> Tensor:
            per_token = values.shape[0] == x.shape[0]
            return values[start:end][keep].double() if per_token else values[s].double()

        new = pick(x)
        old = new.detach() if batch.old_logprobs is None else pick(batch.old_logprobs)
        ratio = (new - old).clamp(-20, 20).exp()
        a = pick(batch.advantages)
        losses = -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
        if dual_clip > 0:
            losses = torch.where(a < 0, torch.minimum(losses, -dual_clip * a), losses)
        if ratio_clip == "cispo":
            losses = -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * a * new
        if batch.weights is not None:
            losses = losses * pick(batch.weights)
        if batch.ref_logprobs is not None and kl_coef:
            d = (new - pick(batch.ref_logprobs)).clamp(-20, 20)
            penalty = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[kl]
            losses = losses + kl_coef * (penalty * ratio if unbiased_kl else penalty)
        per_sequence.append(losses)
        lengths.append(int(keep.sum()))
    means = aggregation == "sequence-mean"
    total = sum(values.mean() if means else values.sum() for values in per_sequence)
    count = sum(lengths) if aggregation == "token-mean" else len(lengths)
    loss = total / (normalizer or count)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad


def assert_float32_gradient(got: Tensor, exact: Tensor) -> None:
    """A few float32 roundings of the largest, since terms of opposite sign are added."""
    error = (got.double() - exact).abs().max()
    assert error <= 8 * 2.0**-24 * exact.abs().max(), (error, exact.abs().max())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "policy", [{"dual_clip": 0.0}, {"dual_clip": 1.4}, {"ratio_clip": "cispo"}]
)
def test_loss_and_gradient_match_autograd(
    aggregation: str, kl: str, per_token: bool, policy: dict[str, Any]
) -> None:
    """Fails if a clip branch, an estimator or a denominator is wrong in loss or gradient."""
    batch = make_batch([5, 1, 0, 40, 9000], per_token)
    batch.weights = torch.rand(9046 if per_token else 5) + 0.5
    normalizer = 3.5 if aggregation == "constant" else 0.0
    options = dict(kl_coef=0.1, kl=kl, aggregation=aggregation, normalizer=normalizer, **policy)
    exact_loss, exact_grad = autograd_loss(batch, **options)
    for capability in CAPABILITIES:
        loss, grad, _ = grpo_loss(batch, **options, capability=capability)
        assert loss == pytest.approx(exact_loss, rel=1e-6, abs=1e-7)
        assert_float32_gradient(grad, exact_grad)
        assert (grad[batch.mask == 0] == 0).all()


@each_capability
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("ratio_clip", ["ppo", "cispo"])
def test_unbiased_kl_matches_autograd(capability: str, kl: str, ratio_clip: str) -> None:
    """Fails if the ratio is no factor of the KL in value or gradient, in a vector or its tail."""
    batch = make_batch([5, 1, 0, 40, 90])
    options = dict(kl_coef=0.3, kl=kl, unbiased_kl=True, ratio_clip=ratio_clip)
    exact_loss, exact_grad = autograd_loss(batch, **options)
    loss, grad, _ = grpo_loss(batch, **options, capability=capability)
    assert loss == pytest.approx(exact_loss, rel=1e-6, abs=1e-7)
    assert_float32_gradient(grad, exact_grad)


@each_capability
def test_metrics_by_hand(capability: str) -> None:
    """Fails if a fraction counts the wrong side of the clip, or divides by all tokens."""
    old = torch.zeros(5)
    logprobs = torch.tensor([1.5, 0.5, 1.0, 4.0, 9.0]).log()
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    mask = torch.tensor([1, 1, 1, 1, 0], dtype=torch.uint8)
    batch = Batch(logprobs, old, a, mask, torch.tensor([0, 5]), old.clone())
    loss, grad, metrics = grpo_loss(
        batch, capability=capability, clip_high=0.2, dual_clip=3.0, aggregation="token-mean"
    )
    # -1.2 (clipped high), +0.8 (clipped low), -1, +3 (dual clip)
    assert loss == pytest.approx((-1.2 + 0.8 - 1.0 + 3.0) / 4)
    assert grad.tolist() == pytest.approx([0.0, 0.0, -0.25, 0.0, 0.0])
    assert metrics["clip_low"] == metrics["clip_high"] == metrics["dual_clip"] == 0.25
    assert metrics["ratio_mean"] == pytest.approx(7.0 / 4)
    assert metrics["ratio_max"] == pytest.approx(4.0)
    assert (metrics["tokens"], metrics["nonfinite"]) == (4.0, 0.0)
    logs = [math.log(r) for r in (1.5, 0.5, 1.0, 4.0)]
    assert metrics["approx_kl"] == pytest.approx(-sum(logs) / 4)
    k3 = [math.exp(-value) + value - 1 for value in logs]
    assert metrics["ref_kl"] == pytest.approx(sum(k3) / 4)


@each_capability
def test_on_policy_tokens_have_ratio_one_and_a_gradient(capability: str) -> None:
    """Fails if old_logprobs = None gives no gradient, or is read."""
    batch = make_batch([3, 4])
    batch.old_logprobs = None
    _, grad, metrics = grpo_loss(batch, capability=capability)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    assert_float32_gradient(grad, autograd_loss(batch)[1])


@each_capability
@pytest.mark.parametrize("distance", [1e-6, 1e-3, 0.3, 0.4, 3.0, 19.0])
def test_the_estimate_of_a_small_divergence_keeps_its_digits(
    capability: str, distance: float
) -> None:
    """Fails if exp(d) - 1 - d is computed as it is written: near 0 nothing would be left."""
    logprobs = torch.linspace(-1, 1, 31) * distance
    zeros = torch.zeros(31)
    ones = torch.ones(31, dtype=torch.uint8)
    batch = Batch(logprobs, None, zeros, ones, torch.tensor([0, 31]), zeros)
    _, grad, metrics = grpo_loss(batch, kl_coef=1.0, aggregation="token-mean",
                                   capability=capability)  # fmt: skip
    d = -logprobs.double()
    assert metrics["ref_kl"] == pytest.approx(float((d.expm1() - d).mean()), rel=1e-6)
    torch.testing.assert_close(grad.double() * 31, -d.expm1(), rtol=1e-6, atol=0.0)


@each_capability
def test_masked_tokens_are_never_touched(capability: str) -> None:
    """Fails if a masked NaN or infinity is multiplied by 0 instead of being skipped."""
    batch = make_batch([6, 6], per_token=True)
    clean = grpo_loss(batch, capability=capability, kl_coef=0.1)
    for values in (batch.logprobs, batch.old_logprobs, batch.advantages, batch.ref_logprobs):
        assert values is not None
        values[batch.mask == 0] = torch.nan
    dirty = grpo_loss(batch, capability=capability, kl_coef=0.1)
    assert dirty[0] == clean[0] and dirty[2] == clean[2]
    assert torch.equal(dirty[1], clean[1])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@each_capability
def test_nothing_valid_gives_zero(aggregation: str, capability: str) -> None:
    """Fails if 0 / 0 reaches the optimizer when a micro-batch holds no trainable token."""
    batch = make_batch([4, 3])
    batch.mask.zero_()
    loss, grad, metrics = grpo_loss(
        batch, aggregation=aggregation, normalizer=2.0, capability=capability
    )
    assert loss == 0.0 and (grad == 0).all() and set(metrics.values()) == {0.0}
    empty = Batch(*(torch.empty(0) for _ in range(3)), torch.empty(0), torch.tensor([0]))
    assert (
        grpo_loss(empty, aggregation=aggregation, normalizer=2.0, capability=capability)[0] == 0.0
    )


@each_capability
def test_far_ratios_are_finite_and_get_no_gradient(capability: str) -> None:
    """Fails if exp overflows before the clamp: inf * 0 makes the gradient NaN."""
    n = 6
    logprobs = torch.tensor([200.0, 200.0, 200.0, -200.0, -200.0, -torch.inf])
    a = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0])
    ones = torch.ones(n, dtype=torch.uint8)
    zeros = torch.zeros(n)
    batch = Batch(logprobs, zeros, a, ones, torch.tensor([0, n]), zeros)
    loss, grad, metrics = grpo_loss(batch, capability=capability, kl_coef=0.1)
    assert math.isfinite(loss)
    assert (grad == 0).all()
    assert metrics["ratio_max"] == pytest.approx(math.exp(20.0))
    assert metrics["nonfinite"] == 1.0


@each_capability
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages"])
def test_nan_is_counted_and_reaches_loss_and_gradient(where: str, capability: str) -> None:
    """Fails if a comparison with NaN picks the clipped branch and hides it."""
    batch = make_batch([4], per_token=True)
    batch.mask.fill_(1)
    getattr(batch, where)[2] = torch.nan
    loss, grad, metrics = grpo_loss(batch, capability=capability)
    assert math.isnan(loss)
    assert grad.isnan().tolist() == [False, False, True, False]
    assert metrics["nonfinite"] == 1.0
    if where != "advantages":
        assert math.isnan(metrics["ratio_max"])


@each_capability
def test_a_global_normalizer_makes_micro_batches_add_up(capability: str) -> None:
    """Fails if splitting a batch changes the loss or the gradient of a token."""
    lengths = [5, 9, 2, 30]
    whole = make_batch(lengths)
    whole.mask.fill_(1)
    for aggregation, normalizer in (("sequence-mean", 4.0), ("token-mean", 46.0)):
        loss, grad, _ = grpo_loss(whole, aggregation=aggregation, capability=capability)
        parts = []
        for lo, hi in ((0, 2), (2, 4)):
            at = slice(int(whole.offsets[lo]), int(whole.offsets[hi]))
            assert whole.old_logprobs is not None
            part = Batch(
                whole.logprobs[at].clone(),
                whole.old_logprobs[at].clone(),
                whole.advantages[lo:hi].clone(),
                whole.mask[at].clone(),
                (whole.offsets[lo : hi + 1] - whole.offsets[lo]).clone(),
            )
            parts.append(
                grpo_loss(
                    part, aggregation=aggregation, normalizer=normalizer, capability=capability
                )
            )
        assert parts[0][0] + parts[1][0] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=1e-6, atol=0.0)


@each_capability
def test_threads_change_no_bit(capability: str) -> None:
    """Fails if the order of the sums follows the threads."""
    batch = make_batch([100_000, 3, 70_000], per_token=True)
    one = grpo_loss(batch, kl_coef=0.1, capability=capability)
    for threads in (2, 5):
        many = grpo_loss(batch, kl_coef=0.1, threads=threads, capability=capability)
        assert many[0] == one[0] and many[2] == one[2]
        assert torch.equal(many[1], one[1])


def test_wrong_options_name_the_value() -> None:
    """Fails if a missing normalizer divides by a count, or an unknown code picks a default."""
    with pytest.raises(ValueError, match="normalizer must be > 0 .*got 0"):
        grpo_loss(make_batch([2]), aggregation="constant")


@each_capability
@pytest.mark.parametrize("n", [1, 3, 7, 8, 9, 17])
def test_every_tail_and_mask_byte(capability: str, n: int) -> None:
    """Fails if lanes beyond a short sequence count, or only the mask's lowest bit is looked at."""
    batch = make_batch([n, 2 * n], per_token=True)
    batch.mask = (batch.mask * torch.randint(1, 256, (3 * n,))).to(torch.uint8)
    exact_loss, exact_grad = autograd_loss(batch, kl_coef=0.1)
    loss, grad, metrics = grpo_loss(batch, kl_coef=0.1, capability=capability)
    assert loss == pytest.approx(exact_loss, rel=1e-6, abs=1e-7)
    assert_float32_gradient(grad, exact_grad)
    assert metrics["tokens"] == (batch.mask != 0).sum()


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3, 2], [0, 5]])
def test_wrong_offsets_are_named(offsets: list[int]) -> None:
    """Fails if offsets that run backwards or past the tokens are followed into other memory."""
    batch = make_batch([4])
    batch.offsets = torch.tensor(offsets)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most 4, got"):
        grpo_loss(batch)
