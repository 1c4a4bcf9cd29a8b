"""The `data` stage."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from r1v3.config.base import Fraction, Positive, Section


class Teacher(Section):
    """See `r1v3.data.chains.TeacherConfig`."""

    glance_sharpness: Annotated[float, Field(gt=0)] = 1.5
    doubt: Fraction = 0.7
    slip: Fraction = 0.05
    check: Fraction = 0.2


class Search(Section):
    """The teacher of `tasks: search`; see `r1v3.data.search_chains.Searcher`.

    signs, largest: what questions are made of. bare, drill: see `r1v3.data.search_rows.Mix`.
    """

    signs: Annotated[str, Field(pattern=r"^(\+-x?|\+x|-x)$")] = "+-"
    largest: Annotated[int, Field(ge=3, le=9)] = 9
    order: Literal["hunch", "fixed"] = "hunch"
    noise: Annotated[float, Field(ge=0)] = 4.0
    plain: Fraction = 0.0
    sharpness: Annotated[float, Field(gt=0)] = 2.0
    check: Fraction = 0.2
    most_trials: Positive = 8
    bare: Fraction = 0.15
    drill: Fraction = 0.25


class Data(Section):
    """Datasets of the handwriting recipe; a count of 0 leaves that dataset out.

    tasks: `handwriting` are the demo's domains, `search` those that are answered by trying and
    verifying (docs/search.md), with the teacher in `search`.
    """

    run: Path
    seed: int = 0
    tasks: Literal["handwriting", "search"] = "handwriting"
    teacher: Teacher = Teacher()
    search: Search = Search()
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
