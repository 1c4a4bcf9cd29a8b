"""Prediction tables that VLMEvalKit's `--mode eval` accepts, one folder for each sample."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from r1v3.config import Suite
from r1v3.files import write_text
from r1v3.suite.answers import AnswerFile
from r1v3.suite.ask import Asked
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.question import Response
from r1v3.suite.table import Table


def write_predictions(
    folder: Path,
    config: Suite,
    benchmark: Benchmark,
    tables: Sequence[Table],
    asked: Sequence[Asked],
    mode: str,
    answers: AnswerFile,
) -> None:
    """Write sample-K/MODEL/MODEL_DATASET.tsv, MODEL being the checkpoint and its mode.

    All columns but pictures are as in the published file, and `prediction` is the text after the
    last `</think>` (the kit's SPLIT_THINK); run the kit with PRED_FORMAT=tsv.
    """
    texts: dict[int, dict[str, str]] = defaultdict(dict)
    for answer in answers.read():
        if answer.sample < config.samples:
            texts[answer.sample][answer.row] = Response(answer.text, mode != "nothink").final
    model = config.name if mode == "slow" else f"{config.name}-{mode}"
    columns = tables[0].columns
    for sample, by_row in texts.items():
        file = io.StringIO()
        writer = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        writer.writerow([*columns, "prediction"])
        for one in asked:
            cells = one.question.cells
            prediction = by_row[one.question.id].replace("\0", "")
            writer.writerow([*(cells.get(name, "") for name in columns), prediction])
        name = f"{model}_{benchmark.kit_name}.tsv"
        write_text(folder / f"sample-{sample}" / model / name, file.getvalue())
