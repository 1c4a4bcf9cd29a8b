"""Machine code as `cuobjdump -sass` prints it, and what of it a thread executes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?")
_WIDTHS = {"64": 2, "128": 4}
# Of instructions that cost more than one issue slot: cycles of one of the four schedulers, by the
# table of arithmetic throughput in the CUDA C++ Programming Guide (compute capability 9.0, 10.0).
_HALF_RATE = {"FMNMX", "FSETP", "ISETP", "IMNMX", "VIMNMX", "LOP3", "SHF", "PRMT", "SEL", "FSEL",
              "F2FP", "IADD3", "LEA"}  # fmt: skip
_EIGHTH_RATE = {"MUFU", "F2F", "I2F", "F2I"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it is, its guard ("!P0" or empty), opcode and operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def is_conditional(self) -> bool:
        """Whether a predicate decides about it, as a guard or, on sm_100, as an operand."""
        return bool(self.guard) or re.search(r"\bU?P\d", self.operands) is not None

    @property
    def is_wide(self) -> bool:
        """Whether it moves 16 bytes per thread."""
        return ".128" in self.opcode

    @property
    def is_load(self) -> bool:
        """Whether it reads global memory into registers."""
        return self.kind == "LDG"

    @cached_property
    def registers(self) -> tuple[frozenset[str], frozenset[str]]:
        """Registers and predicates that it writes and reads."""
        operands = [part.strip() for part in self.operands.split(",")]
        no_result = self.kind in ("ST", "STG", "STS", "BRA", "EXIT", "BAR", "LDGSTS", "RED")
        results = 0 if no_result else 2 if self.kind.endswith("SETP") else 1
        written = _named(operands[:results], self._width if self.is_load else 1)
        return written, _named([*operands[results:], self.guard], 1)

    @property
    def _width(self) -> int:
        return next((n for size, n in _WIDTHS.items() if f".{size}" in self.opcode), 1)


def _named(operands: Iterable[str], width: int) -> frozenset[str]:
    names = set()
    for operand in operands:
        for kind, number, pair in _REGISTER.findall(operand):
            for i in range(2 if pair else width):
                names.add(f"{kind}{int(number) + i}")
    return frozenset(names)


def parse(text: str) -> dict[str, list[Instruction]]:
    """Functions of `cuobjdump -sass` by name.

    Raises:
        ValueError: there is none.
    """
    functions = {}
    for part in text.split("Function : ")[1:]:
        found = _INSTRUCTION.findall(part)
        functions[part.split()[0]] = [Instruction(int(a, 16), *rest) for a, *rest in found]
    if not functions:
        raise ValueError("no function in the output of cuobjdump -sass")
    return functions


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Instructions of the innermost loops, in order.

    A branch backwards that nothing guards leads out of a far part of a function, not round a loop.
    """
    spans = [
        (branch.target, branch.address)
        for branch in code
        if branch.target is not None and branch.is_conditional and branch.target < branch.address
    ]
    inner = [
        (begin, end) for begin, end in spans
        if not any(begin <= a and b <= end and (a, b) != (begin, end) for a, b in spans)
    ]  # fmt: skip
    return [[i for i in code if begin <= i.address <= end] for begin, end in sorted(inner)]


def blocks(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The same instructions cut before every branch's target and after every branch."""
    targets = {instruction.target for instruction in code}
    cut: list[list[Instruction]] = [[]]
    for instruction in code:
        if instruction.address in targets and cut[-1]:
            cut.append([])
        cut[-1].append(instruction)
        if instruction.target is not None:
            cut.append([])
    return [block for block in cut if block]


def slots(code: Iterable[Instruction]) -> int:
    """Cycles of a scheduler that issues these for one warp, by the busiest of its pipes."""
    kinds = [instruction.kind for instruction in code]
    half, eighth = (sum(kind in slow for kind in kinds) for slow in (_HALF_RATE, _EIGHTH_RATE))
    return max(len(kinds), 2 * half, 8 * eighth)


def dependent_loads(code: Sequence[Instruction], stop: Instruction) -> int:
    """Loads that wait for each other before `stop` can be issued."""
    depth: dict[str, int] = {}
    floor = 0  # of everything behind a branch that waits for a load
    for instruction in code:
        written, read = instruction.registers
        known = max((depth.get(name, 0) for name in read), default=0)
        if instruction is stop:
            return max(known, floor)
        if instruction.kind in ("BRA", "EXIT"):
            floor = max(floor, known)
        for name in written:
            depth[name] = max(known, floor) + instruction.is_load
    raise ValueError("the code does not hold the instruction to stop at")


def issued_before_use(code: Sequence[Instruction], loads: Sequence[Instruction]) -> int:
    """Number of `loads` that are issued before the first instruction that needs one of them."""
    waiting: set[str] = set()
    issued = 0
    for instruction in code:
        written, read = instruction.registers
        if waiting & read:
            return issued
        if any(instruction is load for load in loads):
            waiting |= written
            issued += 1
    return issued
