"""The compiled CPU kernels of the group advantages."""

import math

import pytest
import torch
from torch import Tensor

from r1v3 import _C

BASELINES = {"mean": 0, "leave_one_out": 1, "none": 2}
SCALES = {"group": 0, "batch": 1, "none": 2}


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
        center = {
            "mean": r.mean().expand(n),
            "leave_one_out": (r.sum() - r) / (n - 1),
            "none": torch.zeros(n),
        }[baseline]
        std = {"group": r.std(correction=ddof) + 1e-6, "batch": batch_std + 1e-6, "none": 1.0}
        torch.testing.assert_close(
            out[group].double(), (r - center) / std[scale], rtol=1e-6, atol=1e-7
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


def test_wrong_arguments_name_the_value() -> None:
    """Fails if an unknown code picks a default, or offsets past the rewards are followed."""
    with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
        advantages([1.0, 2.0], [[0, 1]], ddof=2)
    values, offsets, out = torch.zeros(2), torch.tensor([0, 3]), torch.zeros(2)
    with pytest.raises(ValueError, match=r"offsets must rise from 0 to at most 2, got .0, 3."):
        _C.group_advantages(
            values.data_ptr(), 2, 0, offsets.data_ptr(), 1, 0, 0, 1, 1e-6, 0, out.data_ptr()
        )


def test_consecutive_groups_need_no_order() -> None:
    """Fails if rewards read in place and rewards gathered by an order give different bits."""
    rewards, lengths = torch.randn(70), [33, 0, 1, 36]
    starts = [0, 33, 33, 34, 70]
    groups = [list(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    out, offsets = torch.empty(70), torch.tensor(starts)
    _C.group_advantages(
        rewards.data_ptr(), 70, 0, offsets.data_ptr(), len(lengths), 0, 0, 1, 1e-6, 0,
        out.data_ptr(),
    )  # fmt: skip
    assert torch.equal(out, advantages(rewards, groups))


@pytest.mark.parametrize(
    "ids",
    [
        [3, 3, 3],
        [1, 2, 2, 5],
        [5, 1, 5, 0, 1],
        [-(2**63), 2**63 - 1, 0, -(2**63)],
        [10**15, 7, 10**15, 7, 7],
        [0, -1, 0, -3],
        [],
    ],
)
def test_segments_of_ids(ids: list[int]) -> None:
    """Fails if sorting by counting, which a narrow range of ids gets, differs from the other."""
    values = torch.tensor(ids, dtype=torch.int64)
    n = len(ids)
    order, offsets = torch.empty(n, dtype=torch.int64), torch.empty(n + 1, dtype=torch.int64)
    groups = _C.segments_of_ids(values.data_ptr(), n, order.data_ptr(), offsets.data_ptr())
    assert order.tolist() == sorted(range(n), key=lambda i: ids[i])
    bounds = offsets[: groups + 1].tolist()
    assert groups == len(set(ids)) and bounds[0] == 0 and bounds[-1] == n
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        assert len(set(values[order[start:end]].tolist())) == 1
