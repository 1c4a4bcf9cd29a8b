"""The `data` stage."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from r1v3.config.base import Fraction, Positive, Section


class Teacher(Section):
    """See `r1v3.data.chains.TeacherConfig`."""

    glance_sharpness: Annotated[float, Field(gt=0)] = 1.5
    doubt: Fraction = 0.7
    slip: Fraction = 0.05
    check: Fraction = 0.2


class Data(Section):
    """Datasets of the handwriting recipe; a count of 0 leaves that dataset out."""

    run: Path
    seed: int = 0
    teacher: Teacher = Teacher()
    tries: Positive = 4
    base: Annotated[int, Field(ge=0)] = 0
    base_validation: Annotated[int, Field(ge=0)] = 0
    explained: Annotated[int, Field(ge=0)] = 0
    explained_validation: Annotated[int, Field(ge=0)] = 0
    skills: Annotated[int, Field(ge=0)] = 0
    skills_validation: Annotated[int, Field(ge=0)] = 0
    sft: Annotated[int, Field(ge=0)] = 0
    sft_validation: Annotated[int, Field(ge=0)] = 0
    grpo: Annotated[int, Field(ge=0)] = 0
    grpo_validation: Annotated[int, Field(ge=0)] = 0
    connector: Annotated[int, Field(ge=0)] = 0
    connector_validation: Annotated[int, Field(ge=0)] = 0
    test_in_domain: Annotated[int, Field(ge=0)] = 0
    test_out_of_domain: Annotated[int, Field(ge=0)] = 0
