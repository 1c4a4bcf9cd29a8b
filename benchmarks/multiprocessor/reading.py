"""From the machine code of a kernel over rows to the phases of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.multiprocessor import sass
from benchmarks.multiprocessor.model import (
    BARRIER,
    CLUSTER,
    FENCE,
    LOAD,
    START,
    STREAM,
    Block,
    Phase,
)
from benchmarks.multiprocessor.sass import Instruction, slots

Code = Sequence[Instruction]


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code and what it takes of a multiprocessor."""

    code: list[Instruction]
    registers: int
    threads: int
    shared: int  # bytes

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.threads // 32

    def block(self, *phases: Phase) -> Block:
        """The same with these phases."""
        return Block(phases, self.threads, self.registers, self.shared)


def part_of_row(kernel: Compiled, read: float, written: float, ends: float) -> Block:
    """A program that loads its part of a row at once and writes as much, or nothing.

    Args:
        read, written: bytes, on average.
        ends: share of the programs that execute what only a row's last part does: the first loop,
            and what is jumped together with it.
    """
    code = _without_loops(kernel.code)
    loads = [i for i in code if i.is_load and i.is_wide]
    loops = sass.loops(kernel.code)
    if not loads or not loops:
        raise ValueError("the kernel has no 16-byte loads outside loops, or no loop")
    begin, end = code.index(loads[0]), code.index(loads[-1])
    reduction = next((k for k in range(end, len(code)) if code[k].kind in _REDUCES), len(code))
    waits = 150.0 + LOAD * sass.dependent_loads(code, loads[0])
    first = sass.issued_before_use(code, loads) / len(loads)
    work = kernel.warps * (slots(code[begin:reduction]) + ends * slots(loops[0]))
    after = code[reduction:]
    barriers = sum(i.kind == "BAR" for i in after)
    phases = [
        Phase(least=START),
        Phase(kernel.warps * slots(code[:begin]), 0.0, waits),
        Phase(0.0, read * first, STREAM),
    ]
    if first < 1:  # some loads wait until a part of the work is done
        phases += [Phase(work * first / 2, 0.0, 60.0), Phase(0.0, read * (1 - first), STREAM)]
        work *= 1 - first / 2
    phases.append(Phase(work, 0.0, 150.0))
    last = Phase(kernel.warps * slots(after), written, 50.0 + BARRIER * min(barriers, 3))
    return kernel.block(*phases, last)


def streamed_row(kernel: Compiled, parts: Sequence[int], rest: float) -> Block:
    """The programs of a row one after the other, each of which reads its part in rounds of a loop.

    A round's loads are issued in the round before.

    Args:
        parts: 16-byte vectors of each thread in each program.
        rest: bytes that the last program collects in a loop of narrow loads.
    """
    code = kernel.code
    loads = [i for i in code if i.is_load and i.is_wide]
    loops = sass.loops(code)
    if len(loops) != 2 or not any(load in loops[0] for load in loads):
        raise ValueError("the kernel has no loop of 16-byte loads, followed by one for the rest")
    early, late = _split(loops[0], next(load for load in loops[0] if load in loads))
    at_once = sum(load in late for load in loads)
    vector = 16.0 * kernel.threads
    before = kernel.warps * slots([i for i in code if i.address < early[0].address])
    waits = 150.0 + LOAD * sass.dependent_loads(code, loads[0])
    after = [i for i in code if i.address > loops[1][-1].address]
    barriers = sum(i.kind == "BAR" for i in after)
    reducing = Phase(kernel.warps * slots(after), 0.0, 50.0 + BARRIER * min(barriers, 3))
    phases = []
    for vectors in parts:
        rounds = [min(at_once, vectors - k) * vector for k in range(0, vectors, at_once)]
        phases += [Phase(least=START), Phase(before, 0.0, waits), Phase(0.0, rounds[0], STREAM)]
        for following in rounds[1:]:
            phases.append(Phase(kernel.warps * slots(early)))
            phases.append(Phase(kernel.warps * slots(late), following, STREAM))
        phases.append(Phase(kernel.warps * slots(loops[0]), 0.0, 150.0))
        phases.append(reducing)
    collecting = Phase(kernel.warps * slots(loops[1]), rest, STREAM)
    return kernel.block(*phases[:-1], *([collecting] if rest else []), phases[-1])


def _split(code: Code, at: Instruction) -> tuple[list[Instruction], list[Instruction]]:
    """The instructions before one, and the rest."""
    return [i for i in code if i.address < at.address], [i for i in code if i.address >= at.address]


@dataclass(frozen=True)
class OnePass:
    """Slots of the one-pass kernel per warp, in its parts, and what its threads wait for."""

    before: int  # the first copy
    copy: float  # per 16-byte vector and thread
    statistics: float
    gradient: float
    exchange: int
    loads: int  # that wait for each other before the first copy
    fences: tuple[int, int]  # before the first copy, and after the row is here


def read_one_pass(code: Code) -> OnePass:
    """Parts of the one-pass kernel, found by what is in its loops."""
    loops = sass.loops(code)
    copies = [loop for loop in loops if any(i.kind == "LDGSTS" for i in loop)]
    shuffle = next(i.address for i in code if i.kind == "SHFL")
    sums = [x for x in loops if x[-1].address < shuffle and _count(x, "LDS") and _count(x, "MUFU")]
    writes = [x for x in loops if _count(x, "STG") and _count(x, "MUFU")]
    if not (copies and sums and writes):
        raise ValueError("the kernel's loops of copies, sums and gradients were not all found")
    first = next(i for i in code if i.kind == "LDGSTS")
    here = [i for i in code if i.address < first.address]
    between = [i for i in code if shuffle <= i.address < writes[0][0].address]
    narrow = [
        b for b in sass.blocks(writes[0]) if any(i.kind == "STG" and not i.is_wide for i in b)
    ]
    wide = [i for i in writes[0] if not any(i in block for block in narrow)]
    fences = [_count(part, "MEMBAR") for part in (here, between)]
    return OnePass(
        before=slots(_without_loops(here)), copy=slots(copies[0]) / _count(copies[0], "LDGSTS"),
        statistics=slots(sums[0]) / _wide(sums[0], "LDS"),
        gradient=slots(wide) / max(_wide(wide, "STG"), 1),
        exchange=slots(_without_loops(between)), loads=sass.dependent_loads(code, first),
        fences=(fences[0], fences[1]),
    )  # fmt: skip


def one_pass(kernel: Compiled, row: int, blocks: int) -> Block:
    """A block of a cluster of `blocks` that holds a row of so many bytes, reads and writes it."""
    parts, share = read_one_pass(kernel.code), row / blocks
    vectors = share / 16 / 32  # of a block, by warps
    sums, quarter = parts.statistics * vectors, share / 4
    meeting = (CLUSTER if blocks > 1 else BARRIER) + FENCE * parts.fences[1] + 2 * BARRIER
    return kernel.block(
        Phase(least=START),
        Phase(parts.before * kernel.warps, 0.0, 150 + LOAD * parts.loads + FENCE * parts.fences[0]),
        Phase(parts.copy * vectors, quarter, STREAM),
        *(Phase(sums / 4, quarter) for _ in range(3)),
        Phase(sums / 4),
        Phase(parts.exchange * kernel.warps, 0.0, meeting),
        Phase(parts.gradient * vectors, share, 300.0),
    )


_REDUCES = ("SHFL", "BAR", "EXIT")


def _count(code: Code, kind: str) -> int:
    return sum(i.kind == kind for i in code)


def _wide(code: Code, kind: str) -> int:
    return sum(i.kind == kind and i.is_wide for i in code)


def _without_loops(code: Code) -> list[Instruction]:
    """The rest without loops, code that is jumped together with one, and padding at the end."""
    loops = [(loop[0].address, loop[-1].address) for loop in sass.loops(code)]
    dropped = list(loops)
    for branch in code:
        target = branch.target
        if target is not None and branch.is_conditional and target > branch.address:
            if any(branch.address < begin and end < target for begin, end in loops):
                dropped.append((branch.address + 1, target - 1))
    exits = [i.address for i in code if i.kind == "EXIT"]
    end = exits[-1] if exits else code[-1].address
    return [
        i for i in code
        if i.kind != "NOP" and i.address <= end
        and not any(begin <= i.address <= last for begin, last in dropped)
    ]  # fmt: skip
