"""A study: runs of the stages in several variants, what is compared, and what is drawn."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from r1v3.config.base import Fraction, Section

Verb = Literal["data", "sft", "grpo", "connector", "select", "eval"]
Arms = dict[str, dict[str, dict[str, Any]]]


class StudyStage(Section):
    """A verb with its file and settings on top.

    `{name}` in a value of `settings` is the run folder of stage `name`, of the same arm and seed,
    which runs first. steps: checkpoints of an earlier stage; the stage runs once for each, as
    `<stage>@<step>`, with `{step}` the checkpoint's folder name.
    """

    verb: Verb
    config: Path
    settings: dict[str, Any] = {}
    steps: tuple[Annotated[int, Field(gt=0)], ...] = ()


class Side(Section):
    """One side of a comparison.

    stage: an `eval` stage, whose answers in `mode` are compared question by question (modes are
    those of the evaluation, and cut-N: slow thinking of which only what was finished within N
    tokens counts); or a training stage, whose metrics in the `part` of its steps are.
    """

    stage: str
    arm: str = "default"
    mode: str = "slow"
    part: tuple[Fraction, Fraction] = (0.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> "Side":
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part {list(self.part)} must begin before it ends")
        return self


class Comparison(Section):
    """A finding: `this` is higher or lower than `than`, or equal within `margin`.

    claim, report: what the report says, and its numbers. of: a measure of answers
    (`r1v3.evaluation.measures`), or a metric of training steps. where: in_domain, out_of_domain,
    all, or a domain or a difficulty of the questions.
    """

    claim: str
    report: str
    of: str = "correct"
    this: Side
    than: Side
    where: str = "in_domain"
    expect: Literal["higher", "lower", "equal"]
    margin: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Comparison":
        if (self.expect == "equal") != (self.margin is not None):
            raise ValueError("`margin` is needed with expect: equal, and only there")
        return self


class RankCorrelation(Section):
    """A finding: over the checkpoints of a run, two quantities rise together (or do not).

    select: the stage that measured the checkpoints' critical-token entropy. scores: the `eval`
    stage with `steps` that scored them in slow thinking. of: what of the selection is ranked.
    """

    claim: str
    report: str
    select: str
    scores: str
    arm: str = "default"
    of: Literal["critical_entropy", "critical_entropy_after", "validation_accuracy"] = (
        "critical_entropy"
    )
    where: str = "in_domain"
    expect: Literal["higher", "lower"] = "higher"


class StudyFigure(Section):
    """A figure.

    draw: `steps` (metrics `of` a training stage over its steps, one line for each arm), `scores`
    (accuracy against tokens of every mode), `budgets` (accuracy against the budget), `checkpoints`
    (the pairs of a rank correlation), `entropies` (the distribution of token entropies over steps).
    arms: those drawn, by default all.
    """

    draw: Literal["steps", "scores", "budgets", "checkpoints", "entropies"]
    title: str
    stage: str
    of: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    where: str = "in_domain"

    @model_validator(mode="after")
    def _check(self) -> "StudyFigure":
        if (self.draw == "steps") != bool(self.of):
            raise ValueError("`of` names the metrics of a figure with draw: steps, and only there")
        return self


class Study(Section):
    """The file of a study.

    title, report: what it is about, and what the report found. seeds: every run is repeated for
    each. stages: by name. arms: variants, by name, with settings for some of the stages. measure:
    stages that run, with all that they need, for every arm. launcher: words put before the verb of
    a printed command, in the place of this Python's r1v3.
    """

    title: str
    report: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    stages: dict[str, StudyStage]
    arms: Arms = {"default": {}}
    measure: Annotated[tuple[str, ...], Field(min_length=1)]
    findings: tuple[Comparison, ...] = ()
    correlations: tuple[RankCorrelation, ...] = ()
    figures: tuple[StudyFigure, ...] = ()
    launcher: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` must differ")
        for name in self.stages:
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"stage {name!r} must be a word of letters, digits, _ and -")
        known, arms = set(self.stages), set(self.arms)
        named = {name for settings in self.arms.values() for name in settings} | set(self.measure)
        for figure in self.figures:
            named.add(figure.stage)
            _require(set(figure.arms), arms, "arm")
        for finding in self.findings:
            named |= {side.stage.partition("@")[0] for side in (finding.this, finding.than)}
            _require({finding.this.arm, finding.than.arm}, arms, "arm")
            _check_sides(self, finding)
        for one in self.correlations:
            named |= {one.select, one.scores}
            _require({one.arm}, arms, "arm")
        _require(named, known, "stage")
        return self


def _require(named: set[str], known: set[str], kind: str) -> None:
    if unknown := sorted(named - known):
        raise ValueError(f"there is no {kind} {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _check_sides(study: Study, finding: Comparison) -> None:
    sides = [finding.this, finding.than]
    _require({side.stage.partition("@")[0] for side in sides}, set(study.stages), "stage")
    kinds = {study.stages[side.stage.partition("@")[0]].verb == "eval" for side in sides}
    if len(kinds) > 1:
        raise ValueError(f"{finding.claim!r} compares answers with metrics of training")
