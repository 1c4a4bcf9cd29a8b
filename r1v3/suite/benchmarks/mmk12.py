"""MMK12, test split: school questions of four subjects."""

from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import BOX, plain_question
from r1v3.suite.question import Question, options_in
from r1v3.suite.table import File, Row


def _question(row: Row, number: int) -> Question:
    text = row["question"].replace("<image>", "").strip()
    return plain_question(
        row,
        id_column="id",
        text=text,
        request=BOX,
        options=options_in(text),
        labels={"subject": row["subject"]},
    )


BENCHMARK = Benchmark(
    key="mmk12",
    title="MMK12",
    files=(File("MMK12/test-00000-of-00001.parquet"),),
    report=78.5,
    columns=("id", "question", "answer"),
    question=_question,
    differences=("own words of the instruction",),
)
