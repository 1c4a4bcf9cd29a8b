"""Triton kernel of `group_advantages`: one program per group, three sweeps over its rewards."""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices


@triton.jit
def _member(order_ptr, position, inside, HAS_ORDER: tl.constexpr):
    """Where in the batch the samples at these positions of the groups are."""
    if HAS_ORDER:
        position = tl.load(order_ptr + position, mask=inside, other=0)
    return position


@triton.jit
def _group_advantages_kernel(
    rewards_ptr,
    order_ptr,
    offsets_ptr,
    length: tl.int64,
    batch_std_ptr,
    out_ptr,
    eps: tl.float32,
    HAS_ORDER: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    RAW_SINGLETON: tl.constexpr,
    DDOF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    begin, n = group * length, length
    if HAS_OFFSETS:
        begin = tl.load(offsets_ptr + group)
        n = tl.load(offsets_ptr + group + 1) - begin
    lanes = tl.arange(0, BLOCK)
    if n > 0:
        # Sums of differences from the first reward: a constant group is exactly constant.
        first = tl.load(rewards_ptr + _member(order_ptr, begin, n > 0, HAS_ORDER))
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            inside = start + lanes < n
            member = _member(order_ptr, begin + start + lanes, inside, HAS_ORDER)
            r = tl.load(rewards_ptr + member, mask=inside, other=0.0)
            total += tl.where(inside, r - first, 0.0)
        mean = tl.sum(total, axis=0) / n
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            inside = start + lanes < n
            member = _member(order_ptr, begin + start + lanes, inside, HAS_ORDER)
            r = tl.load(rewards_ptr + member, mask=inside, other=0.0)
            centered = tl.where(inside, (r - first) - mean, 0.0)
            squares += centered * centered
        std = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(n - DDOF, 1))
        if SCALE == 1:
            std = tl.load(batch_std_ptr)
        for start in range(0, n, BLOCK):
            inside = start + lanes < n
            member = _member(order_ptr, begin + start + lanes, inside, HAS_ORDER)
            r = tl.load(rewards_ptr + member, mask=inside, other=0.0)
            value = r
            if BASELINE != 2:
                value = (r - first) - mean
            if BASELINE == 1:
                value = value * (n / tl.maximum(n - 1, 1).to(tl.float32))
            if SCALE != 2:
                # 0 * r, not 0: a NaN reward stays visible.
                value = tl.where(std == 0, 0.0 * value, value / (std + eps))
            if BASELINE != 2 or SCALE == 0:
                alone = r if RAW_SINGLETON else 0.0 * r
                value = tl.where(n == 1, alone, value)
            tl.store(out_ptr + member, value, mask=inside)


def group_advantages(
    rewards: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    length: int,
    baseline: int,
    scale: int,
    singleton: int,
    ddof: int,
    eps: float,
    batch_std: Tensor | None,
) -> Tensor:
    """Float32 advantages of rewards [N]; codes are positions in `arguments`.

    order: int64 [N], samples in the order of their groups, or None where they are in it.
    offsets: int64 [G + 1], where each group starts, or None for groups of `length`.
    batch_std: 0-d, the standard deviation of all rewards, needed where scale is "batch".
    """
    out = torch.empty_like(rewards)
    groups = rewards.shape[0] // length if offsets is None else offsets.shape[0] - 1
    if groups and rewards.shape[0]:
        # A block as wide as the average group, a warp to every 128 of its samples.
        width = triton.next_power_of_2(triton.cdiv(rewards.shape[0], groups))
        block = min(max(width, 128), 1024)
        with devices.launching_on(rewards):
            _group_advantages_kernel[(groups,)](
                rewards, order, offsets, length, batch_std, out, float(eps),
                HAS_ORDER=order is not None, HAS_OFFSETS=offsets is not None, BASELINE=baseline,
                SCALE=scale, RAW_SINGLETON=singleton == 1, DDOF=ddof, BLOCK=block,
                num_warps=block // 128,
            )  # fmt: skip
    return out
