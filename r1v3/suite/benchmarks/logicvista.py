"""LogicVista: 447 questions; the answer is a letter or several."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import Question, options_in
from r1v3.suite.table import File, Row

_SKILLS = ("inductive", "deductive", "numerical", "spatial", "mechanical")


def _question(row: Row, number: int) -> Question:
    skills = "|".join(skill for skill in _SKILLS if skill in row["skill"])
    return plain_question(row, options=options_in(row["question"]), labels={"skill": skills})


BENCHMARK = Benchmark(
    key="logicvista",
    title="LogicVista",
    files=(File("LogicVista.tsv", "41c5d33adf33765c399e0e6ae588c061"),),
    report=59.7,
    columns=("index", "question", "answer", "skill"),
    question=_question,
    kit_rule=kit.judge_rule,
    kit_name="LogicVista",
    differences=("a rule before the judge; the kit has none",),
)
