"""We-Math: composite problems beside the steps that they are made of.

A composite of n steps has the rows `nsteps_1` to `nsteps_n` and `nsteps_multi`, joined by ID. With
all steps right and the whole right it is mastered (1); with the steps alone, inadequately
generalized (0.5). Strict: the whole without all of its steps is learned by rote (0). Loose: only
without any of its steps.
"""

import re
from collections.abc import Sequence

import numpy as np

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.choices import choice_question
from r1v3.suite.metrics import Units, groups_of
from r1v3.suite.question import Question
from r1v3.suite.table import File, Row

_KEY = re.compile(r"([23])steps_([123]|multi)")


def _question(row: Row, number: int) -> Question | None:
    key = _KEY.fullmatch(row["key"])
    if key is None:
        return None
    unit = f"{key[1]}steps {row['ID']}"
    return choice_question(row, labels=("key", "knowledge concept"), request="", unit=unit)


def check_composites(questions: Sequence[Question]) -> None:
    """Raise ValueError for a composite without all its steps: 525 is not assumed."""
    for unit, places in groups_of(questions).items():
        found = sorted(questions[i].cells["key"].partition("_")[2] for i in places)
        wanted = [*map(str, range(1, int(unit[0]) + 1)), "multi"]
        if found != wanted:
            raise ValueError(
                f"We-Math composite {unit} has the rows {', '.join(found)} of {', '.join(wanted)}; "
                "a partial set cannot be scored"
            )


def _composites(questions: Sequence[Question], outcomes: np.ndarray, *, strict: bool) -> Units:
    rows = []
    for places in groups_of(questions).values():
        whole = [i for i in places if questions[i].cells["key"].endswith("multi")]
        steps = outcomes[[i for i in places if i not in whole]]
        mastered, all_steps = outcomes[whole[0]].astype(bool), steps.all(axis=0)
        known = all_steps if strict else steps.any(axis=0)
        rows.append(np.where(mastered, known, 0.5 * all_steps))
    return Units(np.stack(rows)[:, :, None].astype(np.float64), np.ones((len(rows), 1)))


def strict_score(questions: Sequence[Question], outcomes: np.ndarray) -> Units:
    """Composites by the strict rule."""
    return _composites(questions, outcomes, strict=True)


def loose_score(questions: Sequence[Question], outcomes: np.ndarray) -> Units:
    """Composites by the loose rule."""
    return _composites(questions, outcomes, strict=False)


BENCHMARK = Benchmark(
    key="wemath",
    title="We-Math (strict)",
    files=(File("WeMath.tsv", "b5e969a075f01290a542411fb7766388"),),
    report=56.5,
    columns=("index", "ID", "key", "question", "answer", "A"),
    question=_question,
    kit_rule=kit.choice_rule,
    kit_name="WeMath",
    check=check_composites,
    grouping=strict_score,
    views={"loose": loose_score},
)
