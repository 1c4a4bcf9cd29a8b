"""MMBench 1.1, English: a question counts if it is answered right in every rotation of its options.

Rotation r of question i has the index i + r * 1,000,000. The file is the development split; the
test split has no public answers.
"""

from collections.abc import Sequence

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.choices import choice_question
from r1v3.suite.metrics import all_of_each_unit, groups_of
from r1v3.suite.question import Question
from r1v3.suite.table import File, Row

_ROTATION = 1_000_000


def _question(row: Row, number: int) -> Question:
    if not row["index"].isdecimal():
        raise ValueError(f"index {row['index']!r} is no number, so its rotation is unknown")
    first = str(int(row["index"]) % _ROTATION)
    return choice_question(row, labels=("category", "l2-category"), unit=first)


def check_rotations(questions: Sequence[Question]) -> None:
    """Raise ValueError for a question that lacks a rotation: its AND would be too easy."""
    for unit, places in groups_of(questions).items():
        found = sorted(int(questions[i].id) // _ROTATION for i in places)
        wanted = list(range(max(len(questions[i].options) for i in places)))
        if found != wanted:
            lacking = sorted(set(wanted) - set(found)) or found
            raise ValueError(
                f"MMBench question {unit} has the rotations {found} of {wanted}: "
                f"{lacking} are missing or too many; a partial set cannot be scored"
            )


BENCHMARK = Benchmark(
    key="mmbench",
    title="MMBench-en 1.1",
    files=(File("MMBench_DEV_EN_V11.tsv", "30c05be8f2f347a50be25aa067248184"),),
    report=85.7,
    columns=("index", "question", "answer", "A", "B"),
    question=_question,
    kit_rule=kit.choice_rule,
    kit_name="MMBench_DEV_EN_V11",
    check=check_rotations,
    grouping=all_of_each_unit,
    differences=("development split; the report does not name its split",),
)
