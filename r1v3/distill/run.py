"""`r1v3 distill`: every stage in order, each from what is on disk, so that it can stop anywhere."""

import asyncio
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from r1v3.config import Distill, to_yaml
from r1v3.distill.account import Account, Graded
from r1v3.distill.ask import answers_journal, ask, read_index
from r1v3.distill.choose import Candidate, Chosen, choose
from r1v3.distill.duplicates import Pixels, read_evaluation
from r1v3.distill.endpoint import api_key
from r1v3.distill.estimate import Measured, estimate
from r1v3.distill.grade import grade, grades_journal
from r1v3.distill.languages import require_identifier
from r1v3.distill.questions import count_rows, stream_chosen
from r1v3.distill.score import score, scores_journal
from r1v3.distill.survey import Survey, survey
from r1v3.distill.work import Entry
from r1v3.distill.write import Rows, write_pass_rates, write_rows_of
from r1v3.files import write_json, write_text
from r1v3.journal import Journal
from r1v3.progress import progress_bar, say
from r1v3.suite.judge import Judge

Index = dict[str, dict[int, int]]


@dataclass(frozen=True)
class Verdicts:
    """All graded answers, by question and sample, in file order of the questions."""

    graded: Mapping[str, Mapping[int, Graded]]
    unsettled: int


class Unfinished(RuntimeError):
    """Answers or scores are missing; what is there is kept."""


def run_distill(
    config: Distill, *, estimate_only: bool = False, build_only: bool = False
) -> Account | None:
    """Ask what is missing, then verify, filter, score, choose and write.

    Args:
        estimate_only: print the cost of what is missing, and ask nothing.
        build_only: ask nothing; write what the answers that are there give.

    Returns:
        The account of the run; None with `estimate_only`.

    Raises:
        ValueError: a file or setting cannot be used.
        Unfinished: some answers or scores could not be had; start again to ask them.
    """
    folder = config.run / "distill"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if not estimate_only:
            write_text(config.run / "config" / "distill.yaml", to_yaml(config))
        if not (estimate_only or build_only):
            _require(config)
        surveyed = _survey(config)
        answers = answers_journal(config)
        measured = Measured()
        index = read_index(answers, measured.look)
        missing = _missing(config, surveyed, index)
        if missing or estimate_only:
            for line in estimate(config.teacher, surveyed, missing, measured).lines(config.teacher):
                say(line)
        if estimate_only:
            return None
        if missing and not build_only:
            index, measured = _ask(config, surveyed, missing, answers)
            missing = _missing(config, surveyed, index)
        account = Account(surveyed, measured, config.teacher.answers, off=config.filters.off)
        account.missing = sum(len(numbers) for numbers in missing.values())
        verdicts = _grade(config, surveyed, index, answers)
        scores = _score(config, surveyed, index, answers, verdicts, ask_more=not build_only)
        chosen = _choose(config, account, verdicts, scores)
        _write(config, account, chosen, verdicts, index, answers)
        return account


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from asking the same questions.

    Raises:
        ValueError: one is at work.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another r1v3 distill is at work in {folder}") from error
        yield
    finally:
        os.close(descriptor)


def _require(config: Distill) -> None:
    """Check what would otherwise be missing only once the teacher has been asked.

    Raises:
        ValueError: an environment variable that should hold a key is not set.
        ImportError: an active filter lacks its library.
    """
    for endpoint in (config.teacher, config.scorer):
        if endpoint.url is not None:
            api_key(endpoint)
    if "mixed languages" not in config.filters.off:
        require_identifier()


def _survey(config: Distill) -> Survey:
    pixels = Pixels(config.run / "distill")
    evaluation = read_evaluation(config.duplicates, pixels)
    rows = count_rows(config.questions, config.limit)
    with progress_bar("questions", rows) as bar:
        found = survey(config, pixels, evaluation, bar.update)
    dropped = "".join(f"; {count:,} {why}" for why, count in sorted(found.dropped.items()))
    say(f"{found.rows:,} rows: {len(found.questions):,} questions to ask{dropped}")
    return found


def _missing(config: Distill, surveyed: Survey, index: Index) -> dict[str, list[int]]:
    """Numbers of the samples without an answer, by question."""
    found = {}
    for question in surveyed.questions:
        there = index.get(question.id, {})
        if numbers := [n for n in range(config.teacher.answers) if n not in there]:
            found[question.id] = numbers
    return found


def _ask(
    config: Distill, surveyed: Survey, missing: dict[str, list[int]], answers: Journal
) -> tuple[Index, Measured]:
    total = len(surveyed.questions) * config.teacher.answers
    todo = sum(len(numbers) for numbers in missing.values())
    samples = stream_chosen(config.questions, config.limit, missing)
    with progress_bar("asking", total, done=total - todo) as bar:
        failed = asyncio.run(ask(config, missing, samples, answers, bar.advance))
    measured = Measured()
    index = read_index(answers, measured.look)
    if left := sum(len(numbers) for numbers in _missing(config, surveyed, index).values()):
        raise Unfinished(
            f"{left:,} of {total:,} answers are missing ({_reasons(failed)}); start again to ask "
            "them, or add --build to go on without"
        )
    return index, measured


def _reasons(failed: Counter[str], most: int = 3) -> str:
    parts = [f"{why}: {count:,}" for why, count in failed.most_common(most)]
    return "; ".join(parts + ["..."] * (len(failed) > most)) or "not asked"


def _grade(config: Distill, surveyed: Survey, index: Index, answers: Journal) -> Verdicts:
    journal = grades_journal(config, answers)
    graded: dict[str, dict[int, Graded]] = {}

    def look(entry: Entry) -> None:
        caught = tuple(entry["caught"])
        graded.setdefault(entry["row"], {})[entry["sample"]] = Graded(
            entry["right"], entry["by"], caught, entry["words"]
        )

    done = read_index(journal, look)
    judge = None
    if config.judge.url is not None:
        judge = Judge(config.judge, config.run / "distill" / "judge.jsonl")
    wanted = {question.id: index.get(question.id, {}) for question in surveyed.questions}
    total = sum(len(there) for there in wanted.values())
    before = sum(len(done.get(row, {}).keys() & there) for row, there in wanted.items())
    unsettled = 0
    with progress_bar("verifying", total, done=before) as bar:
        for count, entries in grade(config, surveyed.questions, index, done, answers, judge):
            settled = [e for e in entries if judge is None or e["right"] is not None]
            journal.append(settled)
            unsettled += len(entries) - len(settled)
            for entry in entries:
                look(entry)
            bar.advance(count)
    if judge is not None and judge.rejected is not None:
        say(judge.rejected)
    elif unsettled:
        say(f"{unsettled:,} answers have no verdict of the judge and are asked again next time")
    return Verdicts(graded, unsettled)


def _active(config: Distill, graded: Graded) -> tuple[str, ...]:
    """The filters that drop an answer."""
    return tuple(name for name in graded.caught if name not in config.filters.off)


def _score(
    config: Distill,
    surveyed: Survey,
    index: Index,
    answers: Journal,
    verdicts: Verdicts,
    *,
    ask_more: bool,
) -> dict[tuple[str, int], float] | None:
    """Scores of the chains that passed, by (row, sample); None where there is no scorer."""
    if config.scorer.url is None:
        return None
    journal = scores_journal(config, answers)
    found: dict[tuple[str, int], float] = {}

    def look(entry: Entry) -> None:
        found[entry["row"], entry["sample"]] = entry["score"]

    read_index(journal, look)
    missing: Index = {}
    passed = 0
    for question in surveyed.questions:
        for number, graded in verdicts.graded.get(question.id, {}).items():
            if number < config.teacher.answers and not _active(config, graded):
                passed += 1
                if (question.id, number) not in found:
                    missing.setdefault(question.id, {})[number] = index[question.id][number]
    todo = sum(len(numbers) for numbers in missing.values())
    if todo and ask_more:
        samples = stream_chosen(config.questions, config.limit, missing)
        with progress_bar("scoring", passed, done=passed - todo) as bar:
            failed = asyncio.run(score(config, missing, samples, answers, journal, bar.advance))
        read_index(journal, look)
        if failed:
            raise Unfinished(
                f"{failed.total():,} of {passed:,} scores are missing ({_reasons(failed)}); start "
                "again to ask for them, or add --build to go on without"
            )
    return found


def _choose(
    config: Distill,
    account: Account,
    verdicts: Verdicts,
    scores: Mapping[tuple[str, int], float] | None,
) -> Chosen:
    """Count all answers, and choose among the chains that passed."""
    candidates: list[Candidate] = []
    unscored: dict[tuple[str, int], str] = {}
    for question in account.survey.questions:
        account.domains.setdefault(question.domain, Counter())["questions"] += 1
        answered = [
            (number, graded)
            for number, graded in sorted(verdicts.graded.get(question.id, {}).items())
            if number < config.teacher.answers
        ]
        asked = [graded for _, graded in answered if "refused" not in graded.caught]
        rate = sum(graded.right is True for graded in asked) / max(1, len(asked))
        if asked:
            account.pass_rates.append(rate)
        for number, graded in answered:
            value = None if scores is None else scores.get((question.id, number))
            least = config.scorer.least
            if value is not None and least is not None and value < least:
                graded.caught += ("low score",)
            active = _active(config, graded)
            account.add(graded, question.domain, active)
            if active:
                continue
            if scores is not None and value is None:
                unscored[question.id, number] = "no score"
                continue
            one = Candidate(question.id, number, question.domain, graded.words, value, rate)
            candidates.append(one)
    chosen = choose(candidates, config.choice, config.seed)
    chosen.dropped.update(unscored)
    account.add_written(chosen)
    return chosen


def _write(
    config: Distill,
    account: Account,
    chosen: Chosen,
    verdicts: Verdicts,
    index: Index,
    answers: Journal,
) -> None:
    # Figures load matplotlib and scipy, which an estimate need not wait for.
    from r1v3.distill.figure import distribution_figure
    from r1v3.distill.page import write_page
    from r1v3.distill.samples import show_samples

    folder = config.run / "distill"
    for split, candidates in (("train", chosen.train), ("validation", chosen.validation)):
        places = {(one.row, one.sample): index[one.row][one.sample] for one in candidates}
        name = "sft.parquet" if split == "train" else "sft_validation.parquet"
        write_rows_of(Rows(config, candidates, answers, places, split), folder / name)
    right = {
        row: (
            sum(g.right is True for n, g in of.items() if n < config.teacher.answers),
            sum("refused" not in g.caught for n, g in of.items() if n < config.teacher.answers),
        )
        for row, of in verdicts.graded.items()
    }
    write_pass_rates(folder / "pass_rates.jsonl", account.survey.questions, right)
    write_json(folder / "counts.json", account.as_json())
    figure = distribution_figure(account, folder / "distribution.png")
    shown = show_samples(config, chosen, verdicts.graded, index, answers, account)
    page = write_page(folder / "report.html", config, account, figure, shown)
    say(
        f"{account.right:,} of {account.answers:,} answers are right, {account.passed:,} passed "
        f"every filter; written: {account.train:,} rows for training, {account.validation:,} for "
        "validation"
    )
    if chosen.train:
        say(f"{folder / 'sft.parquet'} is the train_data of r1v3 sft; the account: {page}")
    else:
        say(f"nothing is left to train on; {page} shows why")
