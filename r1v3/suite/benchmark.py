"""The form of a benchmark: from rows to prompts, from answers to verdicts, from verdicts to scores.

A benchmark is one file in `r1v3/suite/benchmarks` that defines one or more of these and is named in
`r1v3/suite/benchmarks/__init__.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from r1v3.suite.metrics import Grouping, each_question
from r1v3.suite.question import Question, Response
from r1v3.suite.rules import answer_rule
from r1v3.suite.table import File, Row

Rule = Callable[[Question, Response], bool | None]


def complete_as_it_is(questions: Sequence[Question]) -> None:
    """Accept any number of questions: each one is scored alone."""


@dataclass(frozen=True)
class Benchmark:
    """One line of the table of scores.

    Attributes:
        key: its name in configurations and files.
        title: its name in tables.
        files: published files; their rows are its rows, in order.
        report: table 1 of the report, in percent; None for one that it does not have.
        columns: without which a file is refused.
        question: the question of a row with its number, or None for a row of another split.
        rule: verdicts of the report's protocol.
        kit_rule: verdicts of VLMEvalKit's rules; None for a benchmark that it does not have.
        kit_name: the name of the data set in VLMEvalKit.
        judged: whether a judge is asked for what rules cannot tell.
        check: raises ValueError for a partial set, naming what it lacks.
        grouping: the score in the first column.
        views: further scores, by name.
        phrases: whether thoughts that say they cannot see the picture are counted (table 5).
        differences: of prompt or scoring from the report's that no setting can remove.
    """

    key: str
    title: str
    files: tuple[File, ...]
    report: float | None
    columns: tuple[str, ...]
    question: Callable[[Row, int], Question | None]
    rule: Rule = answer_rule
    kit_rule: Rule | None = None
    kit_name: str | None = None
    judged: bool = True
    check: Callable[[Sequence[Question]], None] = complete_as_it_is
    grouping: Grouping = each_question
    views: Mapping[str, Grouping] = field(default_factory=dict)
    phrases: bool = False
    differences: tuple[str, ...] = ()
