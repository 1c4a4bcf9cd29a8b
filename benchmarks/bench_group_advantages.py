"""Group-relative advantages of groups of one size."""

import torch
from torch import Tensor

from benchmarks.problem import Mode, Problem, Size, random_normal
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward",)
GROUP_SIZE = 32
MOST_REWARDS_OF_A_LOOP = 2**16


def eager(rewards: Tensor) -> tuple[Tensor]:
    groups = rewards.view(-1, GROUP_SIZE)
    centered = groups - groups.mean(-1, keepdim=True)
    return ((centered / (groups.std(-1, keepdim=True) + 1e-6)).view(-1),)


def loop(rewards: Tensor) -> tuple[Tensor]:
    """The form of verl's default estimator: rewards collected by group, then one at a time."""
    members: dict[int, list[Tensor]] = {}
    for i in range(rewards.shape[0]):
        members.setdefault(i // GROUP_SIZE, []).append(rewards[i])
    moments = {}
    for group, values in members.items():
        stacked = torch.stack(values)
        moments[group] = stacked.mean(), stacked.std()
    advantages = rewards.clone()
    for i in range(rewards.shape[0]):
        mean, std = moments[i // GROUP_SIZE]
        advantages[i] = (rewards[i] - mean) / (std + 1e-6)
    return (advantages,)


def ours(rewards: Tensor) -> tuple[Tensor]:
    return (kernels.group_advantages(rewards, GROUP_SIZE),)


def exact(rewards: Tensor) -> tuple[Tensor]:
    n = rewards.shape[0]
    order = torch.arange(n, device=rewards.device)
    offsets = torch.arange(0, n + 1, GROUP_SIZE, device=rewards.device)
    return (reference.group_advantages(rewards, order, offsets),)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """N rewards: a batch of 1024 prompts, and a large one."""
    batches = [1024 * GROUP_SIZE]
    return [{"N": n} for n in (batches if size == "small" else [*batches, 65_536 * GROUP_SIZE])]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """float32 rewards, read once, and as many advantages."""
    rewards = random_normal(shape["N"], device=device)
    return Problem(
        op="group_advantages",
        mode=mode,
        shape=shape,
        dtype=rewards.dtype,
        inputs={"rewards": rewards},
        ours=ours,
        eager=eager,
        reference=exact,
        restated={"loop, as verl": loop} if shape["N"] <= MOST_REWARDS_OF_A_LOOP else {},
        bytes_read=4 * rewards.numel(),
        bytes_written=4 * rewards.numel(),
    )
