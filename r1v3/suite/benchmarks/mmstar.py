"""MMStar: 1,500 questions that need their picture, in six categories."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.choices import choice_question
from r1v3.suite.table import File

BENCHMARK = Benchmark(
    key="mmstar",
    title="MMStar",
    files=(File("MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e"),),
    report=70.6,
    columns=("index", "question", "answer", "A", "B"),
    question=lambda row, number: choice_question(row, labels=("category",)),
    kit_rule=kit.choice_rule,
    kit_name="MMStar",
)
