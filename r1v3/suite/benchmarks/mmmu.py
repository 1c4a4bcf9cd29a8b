"""MMMU: the 900 questions of the validation split; about 60 of them are open."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.choices import choice_question
from r1v3.suite.question import Question
from r1v3.suite.table import File, Row


def _question(row: Row, number: int) -> Question | None:
    if row["split"] not in ("", "validation"):
        return None
    return choice_question(row, labels=("category", "l2-category"), named_pictures=True)


BENCHMARK = Benchmark(
    key="mmmu",
    title="MMMU (val)",
    files=(File("MMMU_DEV_VAL.tsv", "585e8ad75e73f75dcad265dfd0417d64"),),
    report=76.0,
    columns=("index", "question", "answer", "A", "split"),
    question=_question,
    kit_rule=kit.choice_rule,
    phrases=True,
    kit_name="MMMU_DEV_VAL",
    differences=("the report's rule also counted a box in the thought",),
)
