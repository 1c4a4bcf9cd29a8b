"""Chains to show on the page: some that are kept, some that each filter dropped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from r1v3.config import Distill
from r1v3.config.distill import FilterName
from r1v3.data.sample import Sample
from r1v3.distill.account import LEFT_OUT, Account, Graded
from r1v3.distill.chain import read_chain
from r1v3.distill.choose import Chosen
from r1v3.distill.questions import stream_chosen
from r1v3.journal import Journal
from r1v3.report.transcripts import picture_data_uri

MOST_CHARACTERS = 3000


@dataclass(frozen=True)
class ShownChain:
    """One chain, ready to show.

    Attributes:
        group: `kept`, or the filter or choice that dropped it.
        pictures: data URIs.
        also: other filters that it does not pass.
    """

    group: str
    question: str
    ground_truth: str
    domain: str
    pictures: tuple[str, ...]
    thought: str
    answer: str
    verdict: str
    pass_rate: str
    also: tuple[str, ...]


def show_samples(
    config: Distill,
    chosen: Chosen,
    graded: Mapping[str, Mapping[int, Graded]],
    index: Mapping[str, Mapping[int, int]],
    answers: Journal,
    account: Account,
) -> list[ShownChain]:
    """At most `config.samples` chains of each group, from different questions where there are."""
    picked = _pick(config, chosen, graded, account)
    by_row: dict[str, list[tuple[str, int]]] = {}
    for group, places in picked.items():
        for row, number in places:
            by_row.setdefault(row, []).append((group, number))
    found: list[ShownChain] = []
    for row, sample in stream_chosen(config.questions, config.limit, by_row):
        for group, number in by_row[row]:
            (entry,) = answers.read_at([index[row][number]])
            found.append(_shown(config, group, sample, entry, graded[row], number))
    order = list(picked)
    return sorted(found, key=lambda one: order.index(one.group))


def _pick(
    config: Distill,
    chosen: Chosen,
    graded: Mapping[str, Mapping[int, Graded]],
    account: Account,
) -> dict[str, list[tuple[str, int]]]:
    groups: dict[str, list[tuple[str, int]]] = {
        name: [] for name in ("kept", *get_args(FilterName), *LEFT_OUT)
    }
    domains: dict[str, list[tuple[str, int]]] = {}
    for one in chosen.train:
        domains.setdefault(one.domain, []).append((one.row, one.sample))
    # Of the domains in turn.
    turns = max((len(places) for places in domains.values()), default=0)
    for turn in range(min(turns, config.samples)):
        groups["kept"] += [places[turn] for places in domains.values() if turn < len(places)]
    alone: dict[str, list[tuple[str, int]]] = {name: [] for name in groups}
    for question in account.survey.questions:
        for number, of in sorted(graded.get(question.id, {}).items()):
            if number >= config.teacher.answers:
                continue
            active = [name for name in of.caught if name not in config.filters.off]
            # What no other filter caught shows best what a filter does.
            target = alone if len(active) == 1 else groups
            for name in active:
                _add(target[name], question.id, number, config.samples)
    for (row, number), why in chosen.dropped.items():
        _add(alone[why], row, number, config.samples)
    return {name: (alone[name] + groups[name])[: config.samples] for name in groups}


def _add(places: list[tuple[str, int]], row: str, number: int, most: int) -> None:
    """Add a place, at most one of a question."""
    if len(places) < most and all(row != other for other, _ in places):
        places.append((row, number))


def _shown(
    config: Distill,
    group: str,
    sample: Sample,
    entry: Mapping[str, object],
    graded: Mapping[int, Graded],
    number: int,
) -> ShownChain:
    chain = read_chain(entry)
    of = graded[number]
    asked = [g for n, g in graded.items() if n < config.teacher.answers]
    right = sum(g.right is True for g in asked)
    return ShownChain(
        group=group,
        question=sample.question,
        ground_truth=sample.ground_truth,
        domain=sample.domain or sample.ability or "other",
        pictures=tuple(picture_data_uri(image) for image in sample.images),
        thought=_short(chain.thought),
        answer=_short(chain.answer),
        verdict={True: "right", False: "wrong", None: "no verdict"}[of.right],
        pass_rate=f"{right} of {len(asked)} right",
        also=tuple(name for name in of.caught if name != group),
    )


def _short(text: str) -> str:
    """A text without its middle, if it is long."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    left = len(text) - 2 * half
    return f"{text[:half]}\n[... {left:,} characters are not shown ...]\n{text[-half:]}"
