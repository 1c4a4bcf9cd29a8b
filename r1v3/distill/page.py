"""The page of a run: one HTML file that needs nothing else, not the network and not a script."""

import base64
from itertools import groupby
from pathlib import Path

from r1v3.config import Distill
from r1v3.distill.account import LEFT_OUT, Account, domain_rows
from r1v3.distill.filters import FILTERS
from r1v3.distill.samples import ShownChain
from r1v3.files import write_bytes
from r1v3.report.page import page_template

# What each group of dropped chains means, in words.
MEANINGS = {
    **{name: (drops.__doc__ or "").strip() for name, drops in FILTERS.items()},
    "wrong answer": "The final answer is not the right one.",
    "no verdict": "Neither the rule nor a judge could tell whether the answer is right.",
    "low score": "The scorer gave less than `scorer.least`.",
    "pass rate": "Passed; the question is too easy or too hard for `choice`.",
    "not selected": "Passed; others of the same question were better.",
    "balance": "Passed; its domain and difficulty have rows enough.",
    "no score": "Passed; the scorer was not asked or gave none.",
}
SURVEY_MEANINGS = {
    "repeated row": "The same question stands in an earlier row.",
    "special token": "The question spells a token of the chat template.",
    "unreadable picture": "A picture cannot be decoded.",
    "contaminated": "The question stands in an evaluation set.",
    "near-duplicate": "An earlier question is nearly the same.",
}


def write_page(
    path: Path,
    config: Distill,
    account: Account,
    figure: Path | None,
    shown: list[ShownChain],
) -> Path:
    """Write the page and return its path. All text of questions and chains is escaped."""
    source = None
    if figure is not None:
        source = "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()
    page = page_template("distill.html.j2", Path(__file__).parent).render(
        headline=_headline(account),
        facts=_facts(config, account),
        survey=[
            (why, count, SURVEY_MEANINGS[why], account.survey.examples.get(why, []))
            for why, count in sorted(account.survey.dropped.items())
        ],
        filters=[
            (name, caught, alone, drops, MEANINGS[name])
            for name, caught, alone, drops in account.filters()
            if caught
        ],
        silent=[name for name, caught, _, _ in account.filters() if not caught],
        answers=account.answers,
        left_out=[
            (name, account.left_out[name], MEANINGS[name])
            for name in LEFT_OUT
            if account.left_out[name]
        ],
        domains=domain_rows(account),
        levels=[(name, account.levels[name]) for name in ("easy", "medium", "hard")],
        written=account.train + account.validation,
        figure=source,
        groups=[
            (name, MEANINGS.get(name, ""), list(chains))
            for name, chains in groupby(shown, key=lambda one: one.group)
        ],
    )
    # A reply may hold half of a surrogate pair, which UTF-8 cannot carry.
    write_bytes(path, page.encode("utf-8", errors="replace"))
    return path


def _headline(account: Account) -> str:
    written = account.train + account.validation
    return (
        f"{written:,} chains of thought from {account.answers:,} answers to "
        f"{len(account.survey.questions):,} questions"
    )


def _facts(config: Distill, account: Account) -> list[str]:
    right = account.right / max(1, account.answers)
    facts = [
        f"teacher {config.teacher.model}, {config.teacher.answers} answers to each question",
        f"{100 * right:.1f} % right",
        f"judge {config.judge.model}: {account.by['judge']:,} verdicts"
        if config.judge.url is not None
        else "verdicts by rule",
        f"scorer {config.scorer.model}" if config.scorer.url is not None else "",
        f"{account.measured.tokens / account.measured.answers:,.0f} tokens an answer"
        if account.measured.answers
        else "",
        f"{account.missing:,} answers are missing" if account.missing else "",
        f"seed {config.seed}",
    ]
    return [fact for fact in facts if fact]
