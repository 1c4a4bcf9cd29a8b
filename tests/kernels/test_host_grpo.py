"""The compiled host kernels for group advantages and the clipped policy loss."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from r1v3 import _C

BASELINES = {"mean": 0, "leave_one_out": 1, "none": 2}
SCALES = {"group": 0, "batch": 1, "none": 2}
KLS = {"k1": 0, "k2": 1, "k3": 2}
AGGREGATIONS = {"sequence-mean": 0, "token-mean": 1, "sequence-sum": 2, "constant": 3}
NAMES = (
    "clip_low clip_high dual_clip approx_kl ref_kl ratio_mean ratio_max tokens nonfinite".split()
)


def advantages(
    rewards: list[float] | Tensor,
    groups: list[list[int]],
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: int = 0,
) -> Tensor:
    values = torch.as_tensor(rewards, dtype=torch.float32)
    order = torch.tensor([i for group in groups for i in group], dtype=torch.int64)
    offsets = torch.tensor([0, *torch.tensor([len(g) for g in groups]).cumsum(0).tolist()])
    out = torch.full_like(values, 777.0)
    _C.group_advantages(
        rewards=values.data_ptr(),
        n=values.shape[0],
        order=order.data_ptr(),
        offsets=offsets.data_ptr(),
        n_groups=len(groups),
        baseline=BASELINES[baseline],
        scale=SCALES[scale],
        ddof=ddof,
        eps=eps,
        singleton=singleton,
        out=out.data_ptr(),
    )
    return out


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_advantages_match_the_formula(baseline: str, scale: str, ddof: int) -> None:
    """Fails if a group reads another's rewards, or a baseline or scale is computed otherwise."""
    groups = [[4, 0, 9, 2], [1, 3], [8, 5, 7, 6, 10]]
    rewards = torch.randn(11)
    out = advantages(rewards, groups, baseline, scale, ddof)
    exact = rewards.double()
    batch_std = exact.std(correction=ddof)
    for group in groups:
        r = exact[group]
        n = len(group)
        centre = {
            "mean": r.mean().expand(n),
            "leave_one_out": (r.sum() - r) / (n - 1),
            "none": torch.zeros(n),
        }[baseline]
        std = {"group": r.std(correction=ddof) + 1e-6, "batch": batch_std + 1e-6, "none": 1.0}
        torch.testing.assert_close(
            out[group].double(), (r - centre) / std[scale], rtol=1e-6, atol=1e-7
        )


def test_a_group_without_variance_gives_exactly_zero() -> None:
    """Fails if the mean of equal rewards is rounded: 0.1 seven times, divided by eps."""
    assert advantages([0.1] * 7, [list(range(7))]).tolist() == [0.0] * 7
    assert advantages([0.1] * 7, [list(range(7))], eps=0.0).tolist() == [0.0] * 7
    assert advantages([0.1] * 7, [list(range(7))], scale="batch", eps=0.0).tolist() == [0.0] * 7
    out = advantages([1.0, 1.0, 0.0, 1.0], [[0, 1], [2, 3]], "leave_one_out", "none")
    assert out.tolist() == [0.0, 0.0, -1.0, 1.0]


def test_a_common_offset_keeps_the_variance() -> None:
    """Fails if the variance is E[x^2] - E[x]^2, which gives tens of thousands here."""
    out = advantages([10000.0, 10000.125, 10000.25], [[0, 1, 2]])
    assert out.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-4)


def test_almost_equal_rewards_are_not_equal() -> None:
    """Fails if zero variance is decided by a threshold instead of equality."""
    out = advantages([1.0, 1.0 + 2**-23], [[0, 1]], eps=0.0)
    assert out.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_groups_of_one_and_of_none() -> None:
    """Fails if a lone sample divides by eps or zero, or an empty group moves the others."""
    groups = [[], [2], [], [0, 1]]
    assert advantages([1.0, 3.0, 5.0], groups)[2].item() == 0.0
    assert advantages([1.0, 3.0, 5.0], groups, singleton=1)[2].item() == 5.0
    assert advantages([1.0, 3.0, 5.0], groups, "leave_one_out", "none")[2].item() == 0.0
    assert advantages([1.0, 3.0, 5.0], groups, "none", "none")[2].item() == 5.0
    _C.group_advantages(0, 0, 0, 0, 0, 0, 0, 1, 1e-6, 0, 0)


def test_a_broken_reward_stays_visible() -> None:
    """Fails if NaN becomes a plausible advantage, or spreads to another group."""
    out = advantages([math.nan, 1.0, 0.0, 1.0, math.nan], [[0, 1], [2, 3], [4]])
    assert out[[0, 1, 4]].isnan().all()
    assert out[[2, 3]].isfinite().all()


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


def policy_loss(
    batch: Batch,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 0.0,
    kl_coef: float = 0.0,
    kl: str = "k3",
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
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl=KLS[kl],
        aggregation=AGGREGATIONS[aggregation],
        normalizer=normalizer,
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
    kl_coef: float = 0.0,
    kl: str = "k3",
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
        if batch.weights is not None:
            losses = losses * pick(batch.weights)
        if batch.ref_logprobs is not None and kl_coef:
            d = (new - pick(batch.ref_logprobs)).clamp(-20, 20)
            penalty = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[kl]
            losses = losses + kl_coef * penalty
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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dual_clip", [0.0, 1.4])
def test_loss_and_gradient_match_autograd(
    aggregation: str, kl: str, per_token: bool, dual_clip: float
) -> None:
    """Fails if a clip branch, an estimator or a denominator is wrong in loss or gradient."""
    batch = make_batch([5, 1, 0, 40, 9000], per_token)
    batch.weights = torch.rand(9046 if per_token else 5) + 0.5
    normalizer = 3.5 if aggregation == "constant" else 0.0
    options = dict(
        dual_clip=dual_clip, kl_coef=0.1, kl=kl, aggregation=aggregation, normalizer=normalizer
    )
    loss, grad, _ = policy_loss(batch, **options)
    exact_loss, exact_grad = autograd_loss(batch, **options)
    assert loss == pytest.approx(exact_loss, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=1e-9)
    assert (grad[batch.mask == 0] == 0).all()


def test_metrics_by_hand() -> None:
    """Fails if a fraction counts the wrong side of the clip, or divides by all tokens."""
    old = torch.zeros(5)
    logprobs = torch.tensor([1.5, 0.5, 1.0, 4.0, 9.0]).log()
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    mask = torch.tensor([1, 1, 1, 1, 0], dtype=torch.uint8)
    batch = Batch(logprobs, old, a, mask, torch.tensor([0, 5]), old.clone())
    loss, grad, metrics = policy_loss(batch, clip_high=0.2, dual_clip=3.0, aggregation="token-mean")
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


def test_on_policy_tokens_have_ratio_one_and_a_gradient() -> None:
    """Fails if old_logprobs = None gives no gradient, or is read."""
    batch = make_batch([3, 4])
    batch.old_logprobs = None
    _, grad, metrics = policy_loss(batch)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    torch.testing.assert_close(grad.double(), autograd_loss(batch)[1], rtol=1e-6, atol=1e-9)


def test_masked_tokens_are_never_touched() -> None:
    """Fails if a masked NaN or infinity is multiplied by 0 instead of being skipped."""
    batch = make_batch([6, 6], per_token=True)
    clean = policy_loss(batch, kl_coef=0.1)
    for values in (batch.logprobs, batch.old_logprobs, batch.advantages, batch.ref_logprobs):
        assert values is not None
        values[batch.mask == 0] = torch.nan
    dirty = policy_loss(batch, kl_coef=0.1)
    assert dirty[0] == clean[0] and dirty[2] == clean[2]
    assert torch.equal(dirty[1], clean[1])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_valid_gives_zero(aggregation: str) -> None:
    """Fails if 0 / 0 reaches the optimizer when a micro-batch holds no trainable token."""
    batch = make_batch([4, 3])
    batch.mask.zero_()
    loss, grad, metrics = policy_loss(batch, aggregation=aggregation, normalizer=2.0)
    assert loss == 0.0 and (grad == 0).all() and set(metrics.values()) == {0.0}
    empty = Batch(*(torch.empty(0) for _ in range(3)), torch.empty(0), torch.tensor([0]))
    assert policy_loss(empty, aggregation=aggregation, normalizer=2.0)[0] == 0.0


def test_far_ratios_are_finite_and_get_no_gradient() -> None:
    """Fails if exp overflows before the clamp: inf * 0 makes the gradient NaN."""
    n = 6
    logprobs = torch.tensor([200.0, 200.0, 200.0, -200.0, -200.0, -torch.inf])
    a = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0])
    ones = torch.ones(n, dtype=torch.uint8)
    zeros = torch.zeros(n)
    batch = Batch(logprobs, zeros, a, ones, torch.tensor([0, n]), zeros)
    loss, grad, metrics = policy_loss(batch, kl_coef=0.1)
    assert math.isfinite(loss)
    assert (grad == 0).all()
    assert metrics["ratio_max"] == pytest.approx(math.exp(20.0))
    assert metrics["nonfinite"] == 1.0


@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages"])
def test_nan_is_counted_and_reaches_loss_and_gradient(where: str) -> None:
    """Fails if a comparison with NaN picks the clipped branch and hides it."""
    batch = make_batch([4], per_token=True)
    batch.mask.fill_(1)
    getattr(batch, where)[2] = torch.nan
    loss, grad, metrics = policy_loss(batch)
    assert math.isnan(loss)
    assert grad.isnan().tolist() == [False, False, True, False]
    assert metrics["nonfinite"] == 1.0
    if where != "advantages":
        assert math.isnan(metrics["ratio_max"])


def test_a_global_normalizer_makes_micro_batches_add_up() -> None:
    """Fails if splitting a batch changes the loss or the gradient of a token."""
    lengths = [5, 9, 2, 30]
    whole = make_batch(lengths)
    whole.mask.fill_(1)
    for aggregation, normalizer in (("sequence-mean", 4.0), ("token-mean", 46.0)):
        loss, grad, _ = policy_loss(whole, aggregation=aggregation)
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
            parts.append(policy_loss(part, aggregation=aggregation, normalizer=normalizer))
        assert parts[0][0] + parts[1][0] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=1e-6, atol=0.0)


def test_threads_change_no_bit() -> None:
    """Fails if the order of the sums follows the threads."""
    batch = make_batch([100_000, 3, 70_000], per_token=True)
    one = policy_loss(batch, kl_coef=0.1)
    for threads in (2, 5):
        many = policy_loss(batch, kl_coef=0.1, threads=threads)
        assert many[0] == one[0] and many[2] == one[2]
        assert torch.equal(many[1], one[1])


def test_wrong_options_name_the_value() -> None:
    """Fails if a missing normalizer divides by a count, or an unknown code picks a default."""
    with pytest.raises(ValueError, match="normalizer must be > 0 .*got 0"):
        policy_loss(make_batch([2]), aggregation="constant")
    with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
        advantages([1.0, 2.0], [[0, 1]], ddof=2)
