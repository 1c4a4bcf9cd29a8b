"""PhyX, multiple choice with minimal text: 1,000 questions of six domains (figure 3)."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import options_in
from r1v3.suite.table import File

BENCHMARK = Benchmark(
    key="phyx",
    title="PhyX (MC, minimal text)",
    files=(File("PhyX_mini_MC_TM.tsv"),),
    report=52.8,
    columns=("index", "question", "answer", "category"),
    question=lambda row, number: plain_question(
        row, options=options_in(row["question"]), labels={"domain": row["category"]}
    ),
    kit_rule=kit.phyx_rule,
    kit_name="PhyX_mini_MC_TM",
)
