"""A curriculum: stages of a GRPO run with their own questions, learning rate and length."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from r1v3.config.base import Positive, Section


class Range(Section):
    """Numbers from `least` to `most`, both included; null sets no limit."""

    least: float | None = None
    most: float | None = None

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if self.least is None and self.most is None:
            raise ValueError("give `least` or `most`")
        return self


class CurriculumStage(Section):
    """One stage; what is null is as in the rest of the file.

    train_data: its own file. where: of its rows, those are asked whose `extra_info` (and measured
    `pass_rate`) has these values: one, one of several, or a range. steps: the stage ends after so
    many; plateau: after so many validations in a row without a better accuracy on the validation
    questions that `where` describes (on all, if it describes none). The last stage does not end.
    """

    train_data: Path | None = None
    where: dict[str, Range | str | float | tuple[str | float, ...]] = {}
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    max_tokens: Positive | None = None
    steps: Positive | None = None
    plateau: Positive | None = None


class Curriculum(Section):
    """Stages, one after the other; none is a run without a curriculum.

    pass_rates: JSON lines with `data_source`, `split`, `index` and `pass_rate` of questions, as
    `r1v3 distill` writes them; their `pass_rate` and `difficulty` can stand in `where`.
    validate_by: a key of `extra_info`, such as difficulty; for each of its values the validation
    accuracy is logged as `validation_accuracy_<value>`, whatever the stage.
    """

    stages: tuple[CurriculumStage, ...] = ()
    pass_rates: Path | None = None
    validate_by: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Curriculum":
        for i, stage in enumerate(self.stages, start=1):
            ends, last = stage.steps or stage.plateau, i == len(self.stages)
            if last and ends:
                raise ValueError("the last stage goes on to the end: leave out steps and plateau")
            if not last and not ends:
                raise ValueError(f"stage {i} must end: give it `steps` or `plateau`")
        return self
