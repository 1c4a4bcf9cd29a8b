"""MathVerse, vision only: 788 questions that stand in the picture."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import Question, options_in
from r1v3.suite.table import File, Row, read_mapping


def _question(row: Row, number: int) -> Question:
    about = read_mapping(row["metadata"])
    question = plain_question(
        row,
        options=options_in(row["question_for_eval"]),
        labels={name: str(about.get(name, "")) for name in ("subject", "subfield")},
    )
    # The judge is told what the picture asks.
    return question.told(row["question_for_eval"] or row["question"])


BENCHMARK = Benchmark(
    key="mathverse",
    title="MathVerse (vision only)",
    files=(File("MathVerse_MINIVOnly.tsv", "68a11d4680014ac881fa37adeadea3a4"),),
    report=59.6,
    columns=("index", "question", "answer", "question_for_eval"),
    question=_question,
    kit_rule=kit.judge_rule,
    kit_name="MathVerse_MINI_Vision_Only",
)
