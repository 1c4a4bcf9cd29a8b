"""Finding the table's tensors in a checkpoint, under any of their names, and listing faults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1v3.model.conversion.reader import Checkpoint, Stored
from r1v3.model.conversion.table import (
    IGNORED_SUFFIXES,
    Weight,
    parameter_name,
    saved_name,
)

_LISTED = 12


@dataclass(frozen=True)
class Source:
    """The place of a native tensor's values: in `stored`, from row `row` on."""

    stored: Stored
    row: int


@dataclass
class Report:
    """Missing, unexpected and misshapen tensors of a checkpoint.

    `misshapen` holds (name, file, expected shape, found shape); `ignored` the tensors that were
    left out on purpose (buffers that the model computes, a head that is tied to the embedding).
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def lines(self) -> list[str]:
        """One line per fault, at most a dozen of a kind, and how many more there are."""
        shapes = [
            f"{Path(file).name}: {name} has shape {found}, config.json says {expected}"
            for name, file, expected, found in self.misshapen
        ]
        return [
            line
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("misshapen", shapes),
            )
            for line in _few(kind, names)
        ]


class CheckpointError(ValueError):
    """A checkpoint does not fit its configuration; `report` says in what, all at once."""

    def __init__(self, where: str, report: Report) -> None:
        self.report = report
        faults = (
            f"{len(report.missing)} missing, {len(report.unexpected)} unexpected and "
            f"{len(report.misshapen)} misshapen tensors"
        )
        lines = report.lines()
        told = lines[0] if len(lines) == 1 else "\n  ".join([faults, *lines])
        super().__init__(f"{where} does not fit its config.json: {told}")


def _few(kind: str, lines: Sequence[str]) -> list[str]:
    shown = [f"{kind}: {line}" for line in lines[:_LISTED]]
    hidden = len(lines) - len(shown)
    return shown + ([f"{kind}: and {hidden} more"] if hidden > 0 else [])


def match(checkpoint: Checkpoint, weights: Sequence[Weight]) -> tuple[dict[str, Source], Report]:
    """The source of every native tensor, by parameter name, and the report on the checkpoint.

    Each tensor may have its original name or either native spelling. Sources of tensors that the
    report names as missing are absent.
    """
    sources: dict[str, Source] = {}
    report, used = Report(), set()
    for weight in weights:
        if weight.tied:
            continue
        for part, native in enumerate(weight.native):
            original, row = weight.original_of(part)
            stacked = len(weight.original) < len(weight.native)
            for name in dict.fromkeys((native, saved_name(native), original)):
                if name not in checkpoint or native in sources:
                    continue
                whole = weight.shapes[part]
                if name == original and stacked:
                    whole = (sum(shape[0] for shape in weight.shapes), *whole[1:])
                stored = checkpoint[name]
                if stored.shape != whole and name not in used:
                    report.misshapen.append((name, str(stored.file), whole, stored.shape))
                used.add(name)
                sources[native] = Source(stored, row if name == original else 0)
            if native not in sources:
                report.missing.append(native)
    tied = any(weight.tied for weight in weights)
    for name in checkpoint:
        if name in used:
            continue
        redundant = tied and parameter_name(name) == "lm_head.weight"
        ignorable = name.endswith(IGNORED_SUFFIXES) or redundant
        (report.ignored if ignorable else report.unexpected).append(name)
    return sources, report


def require_match(
    checkpoint: Checkpoint, weights: Sequence[Weight]
) -> tuple[Mapping[str, Source], Report]:
    """`match`, raising CheckpointError where the checkpoint does not fit."""
    sources, report = match(checkpoint, weights)
    if not report.ok:
        raise CheckpointError(checkpoint.description, report)
    return sources, report
