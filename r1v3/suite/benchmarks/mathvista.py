"""MathVista, testmini: 1,000 questions; the text of a row holds hint and choices."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import Question
from r1v3.suite.table import File, Row, read_list


def _question(row: Row, number: int) -> Question:
    choice = row["question_type"] == "multi_choice"
    options = read_list(row["choices"]) if choice else ()
    gold = row["answer"]
    if choice:
        gold = row["answer_option"] or gold
    return plain_question(
        row,
        gold=gold,
        options=options,
        labels={"task": row["task"], "skills": "|".join(read_list(row["skills"]))},
    )


BENCHMARK = Benchmark(
    key="mathvista",
    title="MathVista (mini)",
    files=(File("MathVista_MINI.tsv", "f199b98e178e5a2a20e7048f5dcb0464"),),
    report=77.1,
    columns=("index", "question", "answer", "question_type", "choices"),
    question=_question,
    kit_rule=kit.known_choice_rule,
    kit_name="MathVista_MINI",
)
