"""Group-relative advantages (Skywork-R1V3 report, eq. 6), with RLOO and Dr.GRPO as options."""

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from r1v3.kernels import cpu, devices, reference
from r1v3.kernels.arguments import BASELINES, SCALES, SINGLETONS, check_choice, check_shape
from r1v3.kernels.registration import register_small_op


def group_advantages(
    rewards: Tensor,
    groups: Tensor | Sequence[int] | int,
    *,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """Advantage of each sample over its group: (r - mean) / (std + eps) by default.

    The standard deviation is the unbiased sample one (ddof=1) with eps added. A group without
    variance gives exactly 0 wherever it would be scaled or centered. NaN stays inside its group.

    Args:
        rewards: [N] float.
        groups: [N] integer group ids in any order; or, for consecutive samples, the length of
            every group, or the one length that all of them have. A list of lengths is copied to a
            CUDA device, which a CUDA graph cannot capture; the others can be.
        baseline: "mean", "leave_one_out" (RLOO: the mean of the others) or "none".
        scale: "group", "batch" (std of all rewards) or "none" (Dr.GRPO).
        ddof: 0 or 1, subtracted from the count under the variance.
        eps: >= 0, added to the standard deviation.
        singleton: advantage of a group of one sample where its mean or standard deviation would
            be needed: "zero", or "raw" for its reward.

    Returns:
        [N] float32 (float64 for float64 rewards), detached.

    Raises:
        ValueError: if rewards are not floating point [N], a name is not known, ddof or eps is out
            of range, or groups do not divide the rewards.
    """
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    check_choice("singleton", singleton, SINGLETONS)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and >= 0, got {eps}")
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be a floating-point tensor [N], got {rewards.dtype} "
            f"of shape {list(rewards.shape)}"
        )
    ids, offsets, length = None, None, 0
    if isinstance(groups, Tensor):
        ids = _ids(groups, rewards)
    elif isinstance(groups, int):
        length = _checked_length(groups, rewards.shape[0])
    else:
        offsets = _offsets(groups, rewards)
    codes = BASELINES.index(baseline), SCALES.index(scale), SINGLETONS.index(singleton)
    return _call_group_advantages(rewards, ids, offsets, length, *codes, ddof, eps)


def _ids(ids: Tensor, rewards: Tensor) -> Tensor:
    check_shape("groups", ids, tuple(rewards.shape))
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"groups must be integer ids or a list of lengths, got {ids.dtype}")
    return ids.to(rewards.device, torch.int64)


def _checked_length(length: int, n: int) -> int:
    if length < 1 or n % length != 0:
        raise ValueError(f"groups must be a length >= 1 that divides the {n} rewards, got {length}")
    return length


def _offsets(lengths: Sequence[int], rewards: Tensor) -> Tensor:
    """int64 [G + 1], where each group starts, on the rewards' device."""
    n, total = rewards.shape[0], sum(lengths)
    if len(lengths) == 0 or torch.compiler.is_compiling():
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
        shortest = min(lengths, default=0)
    else:
        # A list of a thousand lengths takes torch.tensor longer than the kernel.
        counts = torch.frombuffer(array("q", lengths), dtype=torch.int64)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(counts, 0, out=offsets[1:])
        shortest = int(counts.min())
    if total != n or shortest < 0:
        raise ValueError(
            f"groups must be lengths >= 0 that add up to the {n} rewards, "
            f"got {list(lengths)[:16]} (sum {total})"
        )
    return offsets.to(rewards.device, non_blocking=True)


def _group_advantages(
    rewards: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    length: int,
    baseline: int,
    scale: int,
    singleton: int,
    ddof: int,
    eps: float,
) -> Tensor:
    """Groups are told by `ids` [N], or where consecutive ones start [G + 1], or by their length."""
    options = baseline, scale, singleton, ddof, eps
    if rewards.dtype != torch.float64:
        rewards = rewards.to(torch.float32).contiguous()
        if cpu.supports(rewards):
            groups = ids if ids is not None else offsets
            if groups is None:
                groups = _equal_offsets(rewards, length)
            return cpu.group_advantages(rewards, groups.contiguous(), ids is not None, *options)
    order = None
    if ids is not None:
        order, offsets = _segments(ids)
    if not devices.runs_triton(rewards):
        if order is None:
            order = torch.arange(rewards.shape[0], device=rewards.device)
        if offsets is None:
            offsets = _equal_offsets(rewards, length)
        return reference.group_advantages(
            rewards, order, offsets, baseline=BASELINES[baseline], scale=SCALES[scale], ddof=ddof,
            eps=eps, singleton=SINGLETONS[singleton],
        )  # fmt: skip
    from r1v3.kernels.triton import group_advantages as triton

    by_batch = SCALES[scale] == "batch" and rewards.numel() > 0
    batch_std = reference.standard_deviation(rewards, ddof) if by_batch else None
    return triton.group_advantages(rewards, order, offsets, length, *options, batch_std)


def _equal_offsets(rewards: Tensor, length: int) -> Tensor:
    return torch.arange(0, rewards.shape[0] + 1, max(length, 1), device=rewards.device)


def _segments(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Samples in the order of their groups [N], and where each group starts there."""
    n = ids.shape[0]
    ordered, order = torch.sort(ids, stable=True)
    # The number of groups stays on the device: N segments, the surplus ones empty.
    starts = torch.ones_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).to(torch.int64)
    offsets = torch.searchsorted(starts.cumsum(0) - 1, torch.arange(n + 1, device=ids.device))
    return order, offsets


def _fake_group_advantages(rewards: Tensor, *rest: object) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=reference.accumulation_dtype(rewards))


_call_group_advantages = register_small_op(
    "group_advantages", _group_advantages, fake=_fake_group_advantages
)
