"""HallusionBench: yes or no about figures; the mean of aAcc, fAcc and qAcc.

The last three of the six parts of an index are its set, figure and question. aAcc counts answers,
fAcc figures of a set all of whose questions are right, qAcc questions of a set that are right on
all its figures. Rows without a picture are left out.
"""

from collections.abc import Sequence

import numpy as np

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.metrics import Units, groups_of
from r1v3.suite.question import Question, in_front
from r1v3.suite.rules import yes_no_rule
from r1v3.suite.table import File, Row


def _parts(index: str) -> tuple[str, str, str]:
    parts = index.split("_")
    if len(parts) < 6:
        raise ValueError(f"index {index!r} does not name a set, a figure and a question")
    return parts[3], parts[4], parts[5]


def _question(row: Row, number: int) -> Question | None:
    if not row.pictures:
        return None
    group = _parts(row["index"])[0]
    prompt, pictures = in_front(row["question"], row.pictures)
    return Question(
        id=row["index"],
        prompt=prompt,
        pictures=pictures,
        text=row["question"],
        gold=row["answer"].strip(),
        unit=f"{row['l2-category']}_{group}",
        labels={"category": row["category"], "l2-category": row["l2-category"]},
        cells=row.cells,
    )


def check_sets(questions: Sequence[Question]) -> None:
    """Raise ValueError for a set in which a question is asked on some of its figures only."""
    for unit, places in groups_of(questions).items():
        figures = {_parts(questions[i].id)[1] for i in places}
        asked = {_parts(questions[i].id)[2] for i in places}
        if len(figures) * len(asked) != len(places):
            raise ValueError(
                f"HallusionBench set {unit} has {len(places)} rows for {len(figures)} figures x "
                f"{len(asked)} questions; a partial set cannot be scored"
            )


def three_accuracies(questions: Sequence[Question], outcomes: np.ndarray) -> Units:
    """Units are sets; their components are answers, figures and questions."""
    samples, right, of = outcomes.shape[1], [], []
    for places in groups_of(questions).values():
        sums, counts = [outcomes[places].sum(axis=0)], [len(places)]
        for part in (1, 2):  # figure, question
            members: dict[str, list[int]] = {}
            for i in places:
                members.setdefault(_parts(questions[i].id)[part], []).append(i)
            whole = [outcomes[rows].min(axis=0) for rows in members.values()]
            sums.append(np.sum(whole, axis=0))
            counts.append(len(members))
        right.append(np.stack(sums, axis=1))
        of.append(counts)
    stacked = np.array(right, dtype=np.float64).reshape(-1, samples, 3)
    return Units(stacked, np.array(of, dtype=np.float64), ("aAcc", "fAcc", "qAcc"))


BENCHMARK = Benchmark(
    key="hallusionbench",
    title="HallusionBench",
    files=(File("HallusionBench.tsv", "0c23ac0dc9ef46832d7a24504f2a0c7c"),),
    report=61.3,
    columns=("index", "question", "answer", "l2-category"),
    question=_question,
    rule=yes_no_rule,
    kit_rule=kit.yes_no_rule,
    kit_name="HallusionBench",
    check=check_sets,
    grouping=three_accuracies,
    differences=("the report does not say which accuracy; this is the mean of three",),
)
