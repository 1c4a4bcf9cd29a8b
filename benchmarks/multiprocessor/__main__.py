"""`python -m benchmarks.multiprocessor`: shares of a copy's rate, by a model. Not measured."""

import argparse

import triton
from rich.console import Console
from rich.table import Table

from benchmarks.multiprocessor.kernels import BFLOAT16, Modelled, modelled
from benchmarks.multiprocessor.model import CHIPS, share_of_copy

VOCABULARIES = (151_674, 151_936, 152_064, 18_976)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.multiprocessor", description=__doc__
    )
    parser.add_argument("--vocab", type=int, action="append", help="instead of the models' own")
    chosen = parser.parse_args().vocab or list(VOCABULARIES)
    compiled = {
        architecture: list(modelled(architecture, chosen))
        for architecture in sorted({chip.architecture for chip in CHIPS}, key=int)
    }
    table = Table(
        title=f"% of a copy, bfloat16 (a model, not measured; Triton {triton.__version__})"
    )
    for heading in ("kernel", "V", "registers", "resident", "kB in flight", "slots / logit"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    for chip in CHIPS:
        table.add_column(chip.name, justify="right")
    first = CHIPS[0].architecture
    for row, case in enumerate(compiled[first]):
        shares = [share_of_copy(compiled[c.architecture][row].block, c) for c in CHIPS]
        table.add_row(*_facts(case), *(f"{100 * min(share, 1.0):.0f}" for share in shares))
    Console(width=110).print(table)


def _facts(case: Modelled) -> list[str]:
    """A row's cells that are the same on H100 and H200."""
    block = case.block
    resident = block.resident
    slots = sum(phase.slots for phase in block.phases)
    reading = [phase.bytes for phase in block.phases[:-1]]
    return [
        case.name, f"{case.vocab:,}", str(block.registers), str(resident),
        f"{resident * max(reading) / 1e3:.0f}", f"{32 * slots * BFLOAT16 / sum(reading):.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
