"""The model of a multiprocessor: what it reads from machine code, and what it makes of it."""

import pytest

from benchmarks.multiprocessor import reading, sass
from benchmarks.multiprocessor.model import CHIPS, Block, Chip, Phase, share_of_copy

# As `cuobjdump -sass` prints a kernel of sm_90: a part of a row is loaded, summed and reduced, and
# a loop collects what is left. Shortened.
EXCERPT = """
		Function : _row_statistics_kernel
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
        /*0000*/ LDC R1, c[0x0][0x28] ; /* 0x00000a00ff017b82 */
            /* 0x000ff00000000800 */
        /*0010*/ LDG.E.64 R2, desc[UR4][R6.64] ; /* 0x0000000406027981 */
        /*0020*/ ISETP.GE.AND P0, PT, R3, R5, PT ; /* 0x000000050300720c */
        /*0030*/ IMAD.WIDE R40, R2, 0x2, R8 ; /* 0x0000000202287825 */
        /*0040*/ @!P0 LDG.E.EF.128 R20, desc[UR6][R40.64] ; /* 0x000000062814a981 */
        /*0050*/ @!P0 LDG.E.EF.128 R16, desc[UR8][R40.64+0x2000] ; /* 0x002000082810b981 */
        /*0060*/ FMNMX R11, R20, R24, !PT ; /* 0x00000018140b7209 */
        /*0070*/ @!P0 LDG.E.EF.128 R12, desc[UR6][R40.64+0x800] ; /* 0x00080006280ca981 */
        /*0080*/ MUFU.EX2 R12, R11 ; /* 0x0000000b000c7308 */
        /*0090*/ @P1 BRA 0xe0 ; /* 0x00000000003c0947 */
        /*00a0*/ LDG.E.U16 R30, desc[UR6][R40.64] ; /* 0x00000006281e7981 */
        /*00b0*/ FADD R11, R11, R30 ; /* 0x0000001e0b0b7221 */
        /*00c0*/ @!P2 BRA 0xa0 ; /* 0xfffffffc00289947 */
        /*00d0*/ NOP ; /* 0x0000000000007918 */
        /*00e0*/ SHFL.BFLY PT, R9, R11, 0x10, 0x1f ; /* 0x0e001f000b097f89 */
        /*00f0*/ BAR.SYNC.DEFER_BLOCKING 0x0 ; /* 0x0000000000007b1d */
        /*0100*/ STG.E desc[UR4][R14.64], R9 ; /* 0x000000090e007986 */
        /*0110*/ EXIT ; /* 0x000000000000794d */
        /*0120*/ BRA 0x120; /* 0xfffffffc00fc7947 */
"""


@pytest.fixture
def code() -> list[sass.Instruction]:
    """The excerpt's instructions."""
    return sass.parse(EXCERPT)["_row_statistics_kernel"]


def test_instructions_are_read(code: list[sass.Instruction]) -> None:
    """Fails if encodings, guards or operands are taken for something else."""
    assert len(code) == 19
    load = code[4]
    assert (load.address, load.guard, load.opcode) == (0x40, "!P0", "LDG.E.EF.128")
    assert load.is_load and load.is_wide and not code[1].is_wide
    written, read = load.registers
    assert written == {"R20", "R21", "R22", "R23"} and read == {"UR6", "R40", "R41", "P0"}
    assert code[2].registers == ({"P0"}, {"R3", "R5"})
    assert code[16].registers == (frozenset(), {"UR4", "R14", "R15", "R9"})
    assert [i.target for i in code if i.target is not None] == [0xE0, 0xA0, 0x120]
    with pytest.raises(ValueError, match="no function"):
        sass.parse("cuobjdump fatal")


def test_control_flow_is_read(code: list[sass.Instruction]) -> None:
    """Fails if padding counts as a loop, or a loop's body is counted with the straight code."""
    assert [[i.address for i in loop] for loop in sass.loops(code)] == [[0xA0, 0xB0, 0xC0]]
    straight = [i.address for i in reading._without_loops(code)]
    assert straight == [*range(0x00, 0xA0, 0x10), 0xE0, 0xF0, 0x100, 0x110]
    assert [len(block) for block in sass.blocks(code)] == [10, 3, 1, 4, 1]


def test_waiting_is_read(code: list[sass.Instruction]) -> None:
    """Fails if a load that waits for another, or a sum before the last load, is overlooked."""
    loads = [i for i in code if i.is_load and i.is_wide]
    assert sass.dependent_loads(code, loads[0]) == 1
    assert sass.dependent_loads(code, code[1]) == 0
    assert sass.issued_before_use(code, loads) == 2


def test_slow_instructions_take_more_slots(code: list[sass.Instruction]) -> None:
    """Fails if a function that has an eighth of the rate counts like an addition."""
    exponential, addition = code[8], code[11]
    assert sass.slots([addition] * 10) == 10
    assert sass.slots([exponential, *[addition] * 3]) == 8
    assert sass.slots([code[6]] * 3 + [addition]) == 6


def test_a_kernel_becomes_phases(code: list[sass.Instruction]) -> None:
    """Fails if bytes are lost between phases, or the loads' dependence costs nothing."""
    kernel = reading.Compiled(code, registers=48, threads=128, shared=1024)
    block = reading.part_of_row(kernel, 16384, 0, 0.25)
    assert block.bytes == pytest.approx(16384) and block.resident == 10
    assert block.phases[1].least > 500  # one load before those of the row
    assert [phase.bytes for phase in block.phases if phase.bytes] == [
        pytest.approx(16384 * 2 / 3), pytest.approx(16384 / 3)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="16-byte loads"):
        reading.part_of_row(reading.Compiled(code[:3], 32, 128, 0), 1, 0, 0)


# The same in rounds: a loop's loads are issued under the round before.
ROUNDS = """
		Function : _row_statistics_kernel
        /*0000*/ LDG.E.64 R2, desc[UR4][R6.64] ; /* 0x0000000406027981 */
        /*0010*/ IMAD.WIDE R40, R2, 0x2, R8 ; /* 0x0000000202287825 */
        /*0020*/ @!P0 LDG.E.EF.128 R20, desc[UR6][R40.64] ; /* 0x000000062814a981 */
        /*0030*/ @!P0 LDG.E.EF.128 R16, desc[UR8][R40.64+0x800] ; /* 0x002000082810b981 */
        /*0040*/ FADD R11, R20, R16 ; /* 0x0000001e0b0b7221 */
        /*0050*/ @!P0 LDG.E.EF.128 R20, desc[UR6][R40.64] ; /* 0x000000062814a981 */
        /*0060*/ @!P0 LDG.E.EF.128 R16, desc[UR8][R40.64+0x800] ; /* 0x002000082810b981 */
        /*0070*/ MUFU.EX2 R12, R11 ; /* 0x0000000b000c7308 */
        /*0080*/ @P1 BRA 0x40 ; /* 0x00000000003c0947 */
        /*0090*/ LDG.E.U16 R30, desc[UR6][R40.64] ; /* 0x00000006281e7981 */
        /*00a0*/ @!P2 BRA 0x90 ; /* 0xfffffffc00289947 */
        /*00b0*/ BAR.SYNC.DEFER_BLOCKING 0x0 ; /* 0x0000000000007b1d */
        /*00c0*/ EXIT ; /* 0x000000000000794d */
"""


def test_rounds_become_phases() -> None:
    """Fails if a program's bytes are not those of its part, or a round's arithmetic is lost."""
    code = sass.parse(ROUNDS)["_row_statistics_kernel"]
    kernel = reading.Compiled(code, registers=48, threads=128, shared=1024)
    block = reading.streamed_row(kernel, [5, 2], 100)
    moved = [phase.bytes for phase in block.phases if phase.bytes]
    assert moved == [4096, 4096, 2048, 4096, 100]
    # Of four warps: one slot before the loads of a round, the 8 of an exponential after them.
    assert [phase.slots for phase in block.phases[3:8]] == [4, 32, 4, 32, 32]
    assert [phase.slots for phase in block.phases[:2]] == [0, 16]
    with pytest.raises(ValueError, match="no loop of 16-byte loads"):
        reading.streamed_row(reading.Compiled(code[:5], 32, 128, 0), [1], 0)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_model_keeps_its_limits(chip: Chip) -> None:
    """Fails if blocks move more than memory gives, or issue more than the schedulers can."""

    def share(*phases: Phase, threads: int = 256) -> float:
        return share_of_copy(Block(phases, threads, 32, 1024), chip, blocks=120)

    assert share(Phase(0, 16384, 600)) == pytest.approx(1, abs=0.05)
    slots = 2 * 4 * chip.gigahertz * 0.95 * 16384 / chip.copy  # twice what a copy's time has
    assert 1 / 3 < share(Phase(slots, 0, 100), Phase(0, 16384, 600)) < 0.55
    assert share(Phase(0, 16384, 20_000), threads=1024) < 0.4  # two blocks cannot hide it


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [151_674, 18_976])
def test_kernels_keep_what_the_model_promises(vocab: int) -> None:
    """Fails if a kernel gets more instructions, registers or waiting than docs/device.md says."""
    pytest.importorskip("triton")
    from benchmarks.multiprocessor.kernels import modelled

    h100, h200, _ = CHIPS
    names = []
    for case in modelled(h100.architecture, [vocab]):
        assert share_of_copy(case.block, h100) >= 0.95, case.name
        assert share_of_copy(case.block, h200) >= 0.9, case.name
        names.append(case.name)
    assert names[:2] == ["row statistics", "row gradient"]
