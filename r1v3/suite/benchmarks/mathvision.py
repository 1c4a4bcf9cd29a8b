"""MathVision: 3,040 questions of mathematical competitions."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import Question
from r1v3.suite.table import File, Row, read_list


def _question(row: Row, number: int) -> Question:
    options = read_list(row["choices"])
    return plain_question(row, options=options, labels={"category": row["category"]})


BENCHMARK = Benchmark(
    key="mathvision",
    title="MathVision",
    files=(File("MathVision.tsv", "93f6de14f7916e598aa1b7165589831e"),),
    report=52.6,
    columns=("index", "question", "answer", "choices"),
    question=_question,
    kit_rule=kit.known_choice_rule,
    kit_name="MathVision",
)
