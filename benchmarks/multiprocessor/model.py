"""A fluid model of one multiprocessor: its blocks share issue slots and its part of the bandwidth.

A block goes through phases; a phase ends when its instructions are issued, its bytes moved, and its
shortest time is over. Slots and bytes are shared equally by the blocks that want them. This
simulates no cycles: expect the truth within 15 %.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Numbers of the maker's data sheet, and the share of the bandwidth that a copy reaches."""

    name: str
    architecture: str
    multiprocessors: int
    terabytes_per_second: float
    gigahertz: float

    @property
    def copy(self) -> float:
        """Bytes per nanosecond that a copy moves through one multiprocessor."""
        return 0.9 * self.terabytes_per_second * 1e3 / self.multiprocessors


CHIPS = (
    Chip("H100 SXM", "90", 132, 3.35, 1.98),
    Chip("H200", "90", 132, 4.8, 1.98),
    Chip("B200", "100", 148, 8.0, 1.965),
)
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 << 10, 2048, 32
RESERVED = 1 << 10  # bytes of shared memory that the system takes from each block
# Nanoseconds, guesses. A read of a row waits behind others, a read of what all blocks of a row
# share comes from a cache; a fence waits for what is under way.
START, LOAD, STREAM, BARRIER, FENCE, CLUSTER = 250.0, 400.0, 650.0, 150.0, 400.0, 700.0
SCHEDULERS, EFFICIENCY = 4, 0.95
# What a warp issues per cycle, whose instructions wait for each other, and a block moves alone.
WARP_RATE, ALONE_BYTES = 0.4, 60.0


@dataclass(frozen=True)
class Phase:
    """Issue slots of a block (one scheduler's cycles for all its warps), bytes, nanoseconds."""

    slots: float = 0.0
    bytes: float = 0.0
    least: float = 0.0


@dataclass(frozen=True)
class Block:
    """A block of threads: its work, and its needs of a multiprocessor."""

    phases: tuple[Phase, ...]
    threads: int
    registers: int  # per thread
    shared: int  # bytes

    @property
    def bytes(self) -> float:
        """Bytes that it moves."""
        return sum(phase.bytes for phase in self.phases)

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor has at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        warps = self.threads // 32
        return min(
            REGISTERS // (per_warp * warps), SHARED // (self.shared + RESERVED),
            THREADS // self.threads, BLOCKS,
        )  # fmt: skip


@dataclass
class _Running:
    """A block on its way: its phase and what is left of it."""

    phase: int
    slots: float
    bytes: float
    least: float

    @property
    def done(self) -> bool:
        return max(self.slots, self.bytes, self.least) <= 1e-9


def share_of_copy(block: Block, chip: Chip, blocks: int = 300) -> float:
    """The rate of many such blocks over that of a copy."""
    rates = [_rate(block, chip, blocks, seed) for seed in range(2)]
    return sum(rates) / len(rates) / chip.copy


def _rate(block: Block, chip: Chip, blocks: int, seed: int) -> float:
    """Bytes per nanosecond after a warm-up; shortest times are drawn, so blocks drift apart."""
    rng = random.Random(seed)
    budget = SCHEDULERS * chip.gigahertz * EFFICIENCY
    alone = block.threads / 32 * WARP_RATE * chip.gigahertz

    def enter(phase: int) -> _Running:
        entered = block.phases[phase]
        least = entered.least * rng.uniform(0.75, 1.25)
        return _Running(phase, entered.slots, entered.bytes, least)

    live = [enter(0) for _ in range(block.resident)]
    for running in live:
        running.least += rng.uniform(0, 4000)
    now, ends = 0.0, []
    while len(ends) < blocks:
        issuing = sum(running.slots > 0 for running in live)
        now += _advance(live, min(budget / max(issuing, 1), alone), chip.copy)
        for i, running in enumerate(live):
            while running.done:
                following = (running.phase + 1) % len(block.phases)
                if following == 0:
                    ends.append(now)
                live[i] = running = enter(following)
    warm = blocks // 4
    return (len(ends) - warm) * block.bytes / (ends[-1] - ends[warm - 1])


def _advance(live: Sequence[_Running], slots: float, bandwidth: float) -> float:
    """Go on until something of some block's phase is done; return the nanoseconds.

    Args:
        slots: that each block which issues has per nanosecond.
    """
    moving = sum(running.bytes > 0 for running in live)
    bytes_ = min(bandwidth / max(moving, 1), ALONE_BYTES)
    step = min(
        left
        for running in live
        for left in (running.slots / slots, running.bytes / bytes_, running.least)
        if left > 1e-9
    )
    for running in live:
        running.slots = max(running.slots - slots * step, 0.0)
        running.bytes = max(running.bytes - bytes_ * step, 0.0)
        running.least = max(running.least - step, 0.0)
    return step
