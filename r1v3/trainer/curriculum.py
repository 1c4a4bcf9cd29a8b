"""The stages of a curriculum: which questions each one asks, and when the next one begins."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from r1v3.config import GRPO, CurriculumStage, Optimizer, Range
from r1v3.data.sample import Sample
from r1v3.trainer.questions import Questions

Facts = Mapping[str, Any]


def facts_of(samples: Sequence[Sample], pass_rates: Path | None) -> list[Facts]:
    """Return what `where` may name of each sample: its `extra_info`, and what was measured.

    Raises:
        ValueError: a line of `pass_rates` has no such keys; names it.
    """
    measured = {} if pass_rates is None else _read_pass_rates(pass_rates)
    return [
        {**one.extra_info, **measured.get(_name(one.data_source, one.split, one.index), {})}
        for one in samples
    ]


def _name(data_source: object, split: object, index: object) -> tuple[str, str, str]:
    return str(data_source), str(split), str(index)


def _read_pass_rates(file: Path) -> dict[tuple[str, str, str], Facts]:
    found: dict[tuple[str, str, str], Facts] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            kept: dict[str, Any] = {"pass_rate": float(entry["pass_rate"])}
            if entry.get("difficulty") is not None:
                kept["difficulty"] = entry["difficulty"]
            found[_name(entry["data_source"], entry.get("split"), entry["index"])] = kept
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} line {number} must be JSON with data_source, split, index and pass_rate: "
                f"{type(error).__name__} {error}"
            ) from error
    return found


def matches(facts: Facts, where: Mapping[str, Any]) -> bool:
    """Whether a sample's facts have the values that `where` asks for."""
    return all(_matches(facts.get(key), wanted) for key, wanted in where.items())


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Range):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        above = wanted.least is None or value >= wanted.least
        return above and (wanted.most is None or value <= wanted.most)
    if isinstance(wanted, tuple):
        return any(_matches(value, one) for one in wanted)
    if isinstance(wanted, float) and isinstance(value, int | float):
        return value == wanted
    return value is not None and str(value) == str(wanted)


@dataclass(frozen=True)
class _Step:
    """A stage with the positions of its questions, and of those it is validated on."""

    config: CurriculumStage
    questions: list[int]
    validated: list[int]


class Course:
    """Where a run is in its curriculum; without one, a single stage with all questions.

    Args:
        asked: facts of the training samples, of each file that some stage asks from. Positions are
            those in all files joined, in this order.
        validation: facts of the validation samples.

    Raises:
        ValueError: a stage has no question; says which values there are.
    """

    def __init__(
        self, config: GRPO, asked: Mapping[Path, Sequence[Facts]], validation: Sequence[Facts]
    ) -> None:
        self.seed = config.seed
        self.stages: list[_Step] = []
        lengths = accumulate((len(facts) for facts in asked.values()), initial=0)
        starts = dict(zip(asked, lengths, strict=False))
        for i, stage in enumerate(config.curriculum.stages or [CurriculumStage()], start=1):
            file = stage.train_data or config.train_data
            rows = [n for n, facts in enumerate(asked[file]) if matches(facts, stage.where)]
            if not rows:
                raise ValueError(_nothing(i, file, stage, asked[file]))
            seen = [n for n, facts in enumerate(validation) if matches(facts, stage.where)]
            first = starts[file]
            chosen = _Step(stage, [first + n for n in rows], seen or list(range(len(validation))))
            self.stages.append(chosen)
        self.number, self.began = 0, 0
        self.best: float | None = None
        self.stale = 0

    @property
    def current(self) -> CurriculumStage:
        """The settings of the stage."""
        return self.stages[self.number].config

    def questions(self) -> Questions:
        """Return the questions of the stage, from their beginning."""
        return Questions(self.stages[self.number].questions, self.seed, stage=self.number)

    def optimizer(self, config: Optimizer) -> Optimizer:
        """Return the optimizer's settings in this stage."""
        rate = self.current.learning_rate
        return config if rate is None else config.model_copy(update={"learning_rate": rate})

    def validated(self, correct: Sequence[float]) -> None:
        """Take note of a validation: the mean correctness of each validation question."""
        rows = self.stages[self.number].validated
        accuracy = sum(correct[i] for i in rows) / max(1, len(rows))
        if self.best is None or accuracy > self.best:
            self.best, self.stale = accuracy, 0
        else:
            self.stale += 1

    def advance(self, step: int) -> bool:
        """Begin the next stage if this one has ended before step `step`; return whether it has."""
        stage = self.current
        over = stage.steps is not None and step - self.began >= stage.steps
        over |= stage.plateau is not None and self.stale >= stage.plateau
        if over:
            self.number, self.began = self.number + 1, step
            self.best, self.stale = None, 0
        return over

    def state(self) -> dict[str, Any]:
        """Return the JSON values to go on from."""
        return {
            "number": self.number,
            "began": self.began,
            "best": self.best,
            "stale": self.stale,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.number, self.began = state["number"], state["began"]
        self.best, self.stale = state["best"], state["stale"]


def grouped_accuracy(
    correct: Sequence[float], facts: Sequence[Facts], key: str
) -> dict[str, float]:
    """Return the mean correctness of the questions with each value of `key`."""
    groups: dict[str, list[float]] = {}
    for value, one in zip(correct, facts, strict=True):
        if one.get(key) is not None:
            groups.setdefault(str(one[key]), []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def _nothing(number: int, file: Path, stage: CurriculumStage, facts: Sequence[Facts]) -> str:
    known = []
    for key in stage.where:
        values = sorted({str(one[key]) for one in facts if one.get(key) is not None})
        shown = ", ".join(values[:5]) + (", ..." if len(values) > 5 else "")
        known.append(f"{key}: {shown or 'no row has it'}")
    return f"curriculum stage {number} has no question in {file} ({'; '.join(known)})"
