"""The demo's own test questions about handwritten digits, in the columns of VLMEvalKit's files."""

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from r1v3.data.sample import Sample
from r1v3.files import write_text
from r1v3.suite import kit
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.benchmarks.plain import plain_question
from r1v3.suite.question import LETTERS, Question, option_cells
from r1v3.suite.table import File, Row

FILE = "R1V3_Digits.tsv"


def rows_of(samples: Sequence[Sample]) -> list[dict[str, str]]:
    """Samples with one picture each as rows; those without options are open, as in MMMU."""
    rows = []
    for i, sample in enumerate(samples):
        (picture,) = sample.images
        rows.append(
            {
                "index": str(i),
                "image": base64.b64encode(picture).decode(),
                "question": sample.question.partition("\nA. ")[0],
                **dict(zip(LETTERS, sample.options or (), strict=False)),
                "answer": sample.ground_truth,
                "category": str(sample.domain),
            }
        )
    return rows


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as tab-separated text; a cell that a row lacks is blank."""
    letters = LETTERS[: max((sum(name in row for name in LETTERS) for row in rows), default=0)]
    columns = ["index", "image", "question", *letters, "answer", "category"]
    columns += sorted({name for row in rows for name in row} - set(columns))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", dialect="excel-tab", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())


def _question(row: Row, number: int) -> Question:
    options = option_cells(row.cells)
    lines = [row["question"], *(f"{a}. {b}" for a, b in zip(LETTERS, options, strict=False))]
    return plain_question(
        row, text="\n".join(lines), options=options, labels={"domain": row["category"]}
    )


BENCHMARK = Benchmark(
    key="digits",
    title="Digits (the demo's)",
    files=(File(FILE),),
    report=None,
    columns=("index", "question", "answer", "category"),
    question=_question,
    kit_rule=kit.choice_rule,
    kit_name=FILE.removesuffix(".tsv"),
)
