"""EMMA-mini with step-by-step instructions: 100 questions each of four subjects."""

from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import LETTERS, Question
from r1v3.suite.table import File, Row, read_list

_SUBJECTS = ("Chemistry", "Coding", "Math", "Physics")
_STEPS = "Please solve the problem step by step."


def _question(row: Row, number: int) -> Question:
    options = read_list(row["options"])
    lines = [row["context"]] if row["context"] else []
    lines.append(row["question"])
    lines += [f"{letter}: {text}" for letter, text in zip(LETTERS, options, strict=False)]
    what = "letter of the right option" if options else "answer, a word or a phrase,"
    return plain_question(
        row,
        id_column="pid",
        text="\n".join(lines),
        request=f"Put the {what} in one \\boxed{{}}. {_STEPS}",
        options=options,
        labels={name: row[name] for name in ("subject", "category", "type")},
        named_pictures=True,
    )


BENCHMARK = Benchmark(
    key="emma",
    title="EMMA-mini (CoT)",
    files=tuple(File(f"EMMA-mini/{name}/test-00000-of-00001.parquet") for name in _SUBJECTS),
    report=40.3,
    columns=("pid", "question", "options", "answer", "subject"),
    question=_question,
    differences=("own words of the instruction",),
)
