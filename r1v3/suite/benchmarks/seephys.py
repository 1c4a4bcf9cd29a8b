"""SeePhys: 2,000 problems of physics, in English and Chinese, some to so many digits."""

from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import Question
from r1v3.suite.table import File, Row

_LABELS = ("level", "subject", "language", "source", "vision_relevance", "img_category", "sig_figs")


def _question(row: Row, number: int) -> Question:
    english = row["language"] != "Chinese"
    digits = row["sig_figs"].partition(".")[0]
    if english:
        request = "Reason first, then give the final answer in <answer> </answer> tags."
        rounded = f" Give it to {digits} significant figures."
    else:
        request = "请先推理，再在<answer></answer>标签中给出最终答案。"
        rounded = f"最终答案保留{digits}位有效数字。"
    if digits.isdecimal() and int(digits) > 0:
        request += rounded
    text = row["question"] or "Answer the question in the picture."
    return plain_question(
        row, text=text, request=request, labels={name: row[name] for name in _LABELS}
    )


BENCHMARK = Benchmark(
    key="seephys",
    title="SeePhys",
    files=(File("SeePhys_total.tsv", "c19612ca99cc8c1351b6c3aa556d25b8"),),
    report=31.5,
    columns=("index", "question", "answer"),
    question=_question,
    kit_rule=kit.seephys_rule,
    kit_name="SeePhys",
    differences=("own words of the instruction",),
)
