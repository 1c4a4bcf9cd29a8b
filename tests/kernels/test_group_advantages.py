"""Group advantages, on every implementation this process can run."""
# mypy: disable-error-code="arg-type,union-attr,index"

import math

import pytest
import torch

from r1v3.kernels import group_advantages, reference
from tests.kernels.budget import assert_within_budget
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.usefixtures("backend")
BASELINES = ["mean", "leave_one_out", "none"]
SCALES = ["group", "batch", "none"]


def test_report_equation_6_by_hand() -> None:
    """Fails if (r - mean) / (std + eps) is computed with another std, or eps elsewhere.

    Group A = (1, 0, 0, 1): mean 1/2, unbiased std sqrt(1/3). Group B = (3, 1): 2, sqrt(2).
    """
    rewards = torch.tensor([1.0, 3.0, 0.0, 0.0, 1.0, 1.0])
    groups = torch.tensor([4, 9, 4, 4, 9, 4])
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1 / (math.sqrt(2) + 1e-6)
    expected = torch.tensor([a, b, -a, -a, -b, a])
    torch.testing.assert_close(group_advantages(rewards, groups), expected, rtol=1e-6, atol=0)
    population = group_advantages(rewards, groups, ddof=0, eps=0.5)
    torch.testing.assert_close(population[:2], torch.tensor([0.5 / (0.5 + 0.5), 1 / (1 + 0.5)]))


def test_leave_one_out_and_unscaled_by_hand() -> None:
    """Fails if RLOO does not use the mean of the other samples, or Dr.GRPO divides."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 4.0])
    got = group_advantages(rewards, [3, 1], baseline="leave_one_out", scale="none")
    torch.testing.assert_close(got, torch.tensor([1.0, -0.5, -0.5, 0.0]))
    got = group_advantages(rewards, [2, 2], scale="none")
    torch.testing.assert_close(got, torch.tensor([0.5, -0.5, -2.0, 2.0]))


def definition(
    rewards: torch.Tensor, groups: torch.Tensor, baseline: str, scale: str, ddof: int, eps: float
) -> torch.Tensor:
    """The formulas again, group by group, the mean of the others from all pairs."""
    out = torch.empty_like(rewards)
    for group in groups.unique():
        mates = rewards[groups == group]
        others = mates.expand(len(mates), -1)[~torch.eye(len(mates), dtype=torch.bool)]
        center = {
            "mean": mates.mean(),
            "leave_one_out": others.view(len(mates), -1).mean(-1),
            "none": torch.zeros_like(mates),
        }[baseline]
        value = mates - center
        if scale != "none":
            value = value / ((mates if scale == "group" else rewards).std(correction=ddof) + eps)
        out[groups == group] = value
    return out


@pytest.mark.parametrize("ddof", [1] if INTERPRETED else [0, 1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_matches_the_definition(baseline: str, scale: str, ddof: int) -> None:
    """Fails if ragged, shuffled groups are confused, or an option computes something else."""
    groups = torch.cat([torch.arange(7).repeat(5), torch.full((700,), 50), torch.tensor([3, 3])])
    groups = groups[torch.randperm(groups.shape[0])]
    rewards = torch.randn(groups.shape[0]) + 2
    options = dict(baseline=baseline, scale=scale, ddof=ddof)
    truth = definition(rewards.double(), groups, **options, eps=1e-6)
    baseline32 = definition(rewards, groups, **options, eps=1e-6)
    got = group_advantages(rewards, groups, **options)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert_within_budget("advantages", got, truth, baseline32, 1e-6)
    double = group_advantages(rewards.double(), groups, **options)
    torch.testing.assert_close(double, truth)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
def test_zero_variance_is_exactly_zero(scale: str, baseline: str) -> None:
    """Fails if seven rewards of 0.1 or 1e6 + 0.1 give advantages out of rounding errors."""
    rewards = torch.tensor([0.1] * 7 + [1e6 + 0.1] * 5 + [0.3] * 600)
    got = group_advantages(rewards, [7, 5, 600], scale=scale, baseline=baseline)
    assert (got == 0).all()


def test_a_large_mean_costs_no_digits() -> None:
    """Fails if the variance is E[x^2] - E[x]^2: rewards 1e6 +- 0.5 must give +-1/sqrt(4/3)."""
    rewards = torch.tensor([1e6 - 0.5, 1e6 + 0.5, 1e6 - 0.5, 1e6 + 0.5])
    expected = torch.tensor([-1.0, 1.0, -1.0, 1.0]) * 0.5 / math.sqrt(1 / 3)
    torch.testing.assert_close(group_advantages(rewards, [4]), expected, rtol=1e-5, atol=0)


def test_singletons() -> None:
    """Fails if a group of one gets a number from an undefined std or an empty mean."""
    rewards = torch.tensor([3.0, 1.0, 2.0])
    assert group_advantages(rewards, [1, 2])[0] == 0
    assert group_advantages(rewards, [1, 2], singleton="raw")[0] == 3
    for baseline in ("mean", "leave_one_out"):
        assert group_advantages(rewards, [1, 2], baseline=baseline, scale="none")[0] == 0
    raw = group_advantages(rewards, [1, 2], baseline="none", scale="none")
    assert torch.equal(raw, rewards)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_reward_stays_in_its_group(bad: float) -> None:
    """Fails if a NaN reward disappears, or poisons the groups beside it."""
    got = group_advantages(torch.tensor([1.0, bad, 0.0, 1.0, 2.0, bad]), [2, 3, 1])
    assert got.isnan().tolist() == [True, True, False, False, False, True]


def test_lengths_and_ids_agree() -> None:
    """Fails if the two ways to name groups differ in a bit, or empty groups or none break."""
    rewards = torch.randn(9, 2)[:, 1]
    ids = torch.tensor([5, 5, 5, 2, 2, 2, 2, 7, 7], dtype=torch.int32)
    assert torch.equal(group_advantages(rewards, ids), group_advantages(rewards, [3, 0, 4, 2]))
    assert torch.equal(group_advantages(rewards.clone(), ids), group_advantages(rewards, ids))
    assert torch.equal(group_advantages(rewards, 3), group_advantages(rewards, [3, 3, 3]))
    assert group_advantages(torch.zeros(0), 3).shape == (0,)
    assert group_advantages(torch.zeros(0), []).shape == (0,)
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_bit_equal_wherever_the_group_stands() -> None:
    """Fails if a group's advantages depend on the other groups, or on the run."""
    rewards = torch.randn(64)
    together = group_advantages(rewards, [16] * 4)
    assert torch.equal(together, group_advantages(rewards, [16] * 4))
    for g in range(4):
        alone = group_advantages(rewards[16 * g : 16 * g + 16], [16])
        assert torch.equal(together[16 * g : 16 * g + 16], alone)


def test_wrong_arguments_raise() -> None:
    """Fails if a mistake goes through, or the message does not name it."""
    r = torch.randn(4)
    cases = [
        (lambda: group_advantages(r, [3, 2]), r"lengths >= 0 that add up to the 4.*sum 5"),
        (lambda: group_advantages(r, [5, -1]), "groups must be lengths >= 0"),
        (lambda: group_advantages(r, 3), "a length >= 1 that divides the 4 rewards, got 3"),
        (lambda: group_advantages(r, 0), "a length >= 1 that divides the 4 rewards, got 0"),
        (lambda: group_advantages(r, torch.arange(3)), r"groups must have shape \[4\]"),
        (lambda: group_advantages(r, r), "groups must be integer ids"),
        (lambda: group_advantages(r[None], [4]), "rewards must be a floating-point tensor"),
        (lambda: group_advantages(r.long(), [4]), "rewards must be a floating-point tensor"),
        (lambda: group_advantages(r, [4], baseline="median"), "baseline must be one of.*'median'"),
        (lambda: group_advantages(r, [4], scale="x"), "scale must be one of"),
        (lambda: group_advantages(r, [4], singleton="x"), "singleton must be one of"),
        (lambda: group_advantages(r, [4], ddof=2), "ddof must be 0 or 1"),
        (lambda: group_advantages(r, [4], eps=-1.0), "eps must be finite"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_reference_gives_the_same() -> None:
    """Fails if an implementation and the specification part ways on mixed groups."""
    rewards = torch.randn(40)
    order, offsets = torch.arange(40), torch.tensor([0, 1, 1, 17, 40])
    want = reference.group_advantages(rewards, order, offsets, singleton="raw")
    got = group_advantages(rewards, [1, 0, 16, 23], singleton="raw")
    torch.testing.assert_close(got, want)
