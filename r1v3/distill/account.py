"""The account of a run: what became of every question and every answer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from r1v3.config.distill import FilterName
from r1v3.distill.choose import Candidate, Chosen, difficulty
from r1v3.distill.estimate import Measured
from r1v3.distill.survey import Survey

_MOST_DOMAINS = 12
LEFT_OUT = ("pass rate", "not selected", "balance", "no score")


@dataclass
class Graded:
    """One answer with its verdict.

    Attributes:
        right: None where there is no verdict.
        by: `rule` or `judge`.
        caught: filters that it does not pass, those that are off included.
        words: of its thought.
    """

    right: bool | None
    by: str | None
    caught: tuple[str, ...]
    words: int


@dataclass
class Account:
    """Counts of a run.

    Attributes:
        answers_each: answers asked of each question.
        caught: answers that each filter caught; alone: those that no other active one did.
        left_out: passed every filter, and are not written.
        by: verdicts by rule and by judge.
        domains: for each domain, questions, answers, right answers, and rows written.
        pass_rates: of the questions that have answers.
        levels: rows written by difficulty.
    """

    survey: Survey
    measured: Measured
    answers_each: int
    answers: int = 0
    right: int = 0
    passed: int = 0
    missing: int = 0
    by: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)
    off: tuple[str, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    train: int = 0
    validation: int = 0
    domains: dict[str, Counter[str]] = field(default_factory=dict)
    levels: Counter[str] = field(default_factory=Counter)
    pass_rates: list[float] = field(default_factory=list)

    def add(self, graded: Graded, domain: str, active: tuple[str, ...]) -> None:
        """Count an answer; `active`: the filters that drop it."""
        self.answers += 1
        self.right += graded.right is True
        self.by[graded.by or "none"] += 1
        self.caught.update(graded.caught)
        self.passed += not active
        if len(active) == 1:
            self.alone[active[0]] += 1
        here = self.domains.setdefault(domain, Counter())
        here["answers"] += 1
        here["right"] += graded.right is True

    def add_written(self, chosen: Chosen) -> None:
        """Count what is written and what is left out."""
        self.train, self.validation = len(chosen.train), len(chosen.validation)
        self.left_out.update(chosen.dropped.values())
        for one in (*chosen.train, *chosen.validation):
            self._add_row(one)

    def _add_row(self, one: Candidate) -> None:
        self.domains.setdefault(one.domain, Counter())["written"] += 1
        self.levels[difficulty(one.pass_rate)] += 1

    def filters(self) -> list[tuple[str, int, int, bool]]:
        """Name, answers caught, answers that it alone caught, and whether it drops, by filter."""
        return [
            (name, self.caught[name], self.alone[name], name not in self.off)
            for name in get_args(FilterName)
        ]

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        levels: Mapping[str, int] = {name: self.levels[name] for name in ("easy", "medium", "hard")}
        return {
            "rows": self.survey.rows,
            "questions": len(self.survey.questions),
            "rows_not_asked": dict(sorted(self.survey.dropped.items())),
            "answers": self.answers,
            "answers_missing": self.missing,
            "right": self.right,
            "verdicts": {name: self.by[name] for name in ("rule", "judge", "none")},
            "filters": {
                name: {"caught": caught, "caught_alone": alone, "drops": drops}
                for name, caught, alone, drops in self.filters()
            },
            "passed": self.passed,
            "left_out": {name: self.left_out[name] for name in LEFT_OUT},
            "written": {"train": self.train, "validation": self.validation},
            "domains": {
                name: {key: of[key] for key in ("questions", "answers", "right", "written")}
                for name, of in sorted(self.domains.items())
            },
            "difficulties": levels,
            "tokens": {
                "answers_measured": self.measured.answers,
                "prompt": self.measured.prompt_tokens,
                "completion": self.measured.tokens,
            },
        }


def domain_rows(account: Account) -> list[tuple[str, int, int]]:
    """Name, questions and rows written of the largest domains, the rest as one."""
    counted = [(name, of["questions"], of["written"]) for name, of in account.domains.items()]
    counted.sort(key=lambda row: (-row[1], row[0]))
    if len(counted) > _MOST_DOMAINS:
        rest = counted[_MOST_DOMAINS - 1 :]
        name = f"{len(rest)} others"
        counted = counted[: _MOST_DOMAINS - 1]
        counted.append((name, sum(row[1] for row in rest), sum(row[2] for row in rest)))
    return counted
