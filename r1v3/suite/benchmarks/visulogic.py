"""VisuLogic: 1,000 visual puzzles of six categories, four options in the picture; never a judge."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.table import File

_REQUEST = (
    "Solve the puzzle step by step: reason first, then end with the letter of the right option as "
    "Answer: \\boxed{LETTER}"
)

BENCHMARK = Benchmark(
    key="visulogic",
    title="VisuLogic",
    files=(File("VisuLogic.tsv", "b0820b5ec1e01dfe3951927f0def73b6"),),
    report=28.5,
    columns=("index", "question", "answer", "category"),
    question=lambda row, number: plain_question(
        row, request=_REQUEST, labels={"category": row["category"]}
    ),
    kit_rule=kit.visulogic_rule,
    kit_name="VisuLogic",
    judged=False,
    differences=("own words of the instruction",),
)
