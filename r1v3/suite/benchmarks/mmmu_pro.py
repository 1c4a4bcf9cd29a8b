"""MMMU-Pro: 1,730 questions with ten options, and the same as pictures alone.

The report has one number and does not say of which form; both are asked.
"""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.choices import SELECT, choice_question
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import Question, option_cells
from r1v3.suite.table import File, Row

_ONE_OF_TWO = "the report does not say which form of MMMU-Pro"


def _vision(row: Row, number: int) -> Question:
    return plain_question(
        row,
        text="Answer the multiple-choice question in the picture.",
        request=SELECT.replace("above", "in it"),
        options=option_cells(row.cells),
        labels={"category": row["category"]},
    )


TEN_OPTIONS = Benchmark(
    key="mmmu_pro",
    title="MMMU-Pro (10 options)",
    files=(File("MMMU_Pro_10c.tsv", "22cee868fe6b680d14b99bfff6db8172"),),
    report=55.4,
    columns=("index", "question", "answer", "A", "B"),
    question=lambda row, number: choice_question(row, labels=("category",), named_pictures=True),
    kit_rule=kit.choice_rule,
    kit_name="MMMU_Pro_10c",
    differences=(_ONE_OF_TWO,),
)
VISION = Benchmark(
    key="mmmu_pro_vision",
    title="MMMU-Pro (vision)",
    files=(File("MMMU_Pro_V.tsv", "d01441a87b3dbe721b5a04652ae38009"),),
    report=55.4,
    columns=("index", "answer"),
    question=_vision,
    kit_rule=kit.choice_rule,
    kit_name="MMMU_Pro_V",
    differences=(_ONE_OF_TWO, "own words of the instruction"),
)
