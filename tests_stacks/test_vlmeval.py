"""VLMEvalKit (its distribution ms-vlmeval) as a client of `r1v3 serve`, and on our predictions.

The kit imports torchvision, which would bring another torch: `stand_in` takes its place.
"""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests_stacks.serving import MODEL, ROOT, r1v3, serving, verdicts

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vlmeval") is None, reason="VLMEvalKit is not installed"
)

ROWS = 24
# Rows of one's own need a name of their own: a file with a published name is downloaded again.
DATA = {"digits": {"class": "ImageMCQDataset", "dataset": "digits"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MMStar.tsv, and the same as digits.tsv."""
    made = tmp_path_factory.mktemp("vlmeval")
    write = r1v3("tests_stacks.digits", "write", made, str(ROWS))
    subprocess.run(write, cwd=ROOT, check=True)
    shutil.copy(made / "MMStar.tsv", made / "digits.tsv")
    return made


def run_kit(folder: Path, work: Path, models: dict[str, Any], *further: str) -> None:
    """Run the kit on digits.tsv without a judge."""
    config = work.with_suffix(".json")
    config.write_text(json.dumps({"model": models, "data": DATA}))
    stand_in = str(ROOT / "tests_stacks" / "stand_in")
    environment = {
        **os.environ,
        "PYTHONPATH": stand_in,
        "LMUData": str(folder),
        "PRED_FORMAT": "tsv",
        "SPLIT_THINK": "True",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "vlmeval.run", "--config", str(config)]
    command += ["--work-dir", str(work), "--judge", "exact_matching", *further]
    subprocess.run(command, check=True, env=environment, cwd=folder)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


def assert_verdicts_are_ours(results: Path, folder: Path) -> None:
    """Hold the kit's verdict on every answer against our protocol kit's.

    Where its rules find nothing, it draws a letter: those answers have no verdict of ours.
    """
    rows = table(results)
    assert len(rows) == ROWS
    answers = [
        {"text": row["prediction"], "answer": row["answer"], "options": [row[c] for c in "ABC"]}
        for row in rows
    ]
    ours = [one["kit"] for one in verdicts(answers, folder)]
    told = [(mine, row["hit"] == "1") for mine, row in zip(ours, rows, strict=True)]
    assert sum(mine is not None for mine in ours) > ROWS // 4
    assert all(mine == theirs for mine, theirs in told if mine is not None)


@pytest.mark.parametrize("model", ["tiny-internvl-nothink", "tiny-internvl-budget-8"])
def test_scores_of_served_answers_are_ours(folder: Path, tmp_path: Path, model: str) -> None:
    """Fails if a request of the kit is refused, or a verdict differs from our protocol kit."""
    with serving() as address:
        served = {
            "class": "LMDeployAPI",
            "model": model,
            "api_base": f"{address}/chat/completions",
            "key": "x",
            "temperature": 0,
            "retry": 1,
        }
        run_kit(folder, tmp_path / "out", {model: served}, "--api-nproc", "4")
    (file,) = (tmp_path / "out" / model).glob(f"{model}_digits_*_result.tsv")
    assert_verdicts_are_ours(file, tmp_path)


def test_it_evaluates_our_predictions(folder: Path, tmp_path: Path) -> None:
    """Fails if `--mode eval` does not take what `r1v3 suite` writes, or scores it otherwise."""
    settings = [
        *("name=tiny", f"run={tmp_path / 'run'}", f"data={folder}", f"model={MODEL}"),
        *("benchmarks=[mmstar]", "allow_other_files=true", "protocol=kit", "modes=[nothink]"),
        *("samples=1", "decoding.temperature=0"),
    ]
    suite = r1v3("r1v3", "suite", "configs/suite/tiny.yaml", *settings)
    subprocess.run(suite, cwd=ROOT, check=True)
    written = tmp_path / "run/suite/kit/sample-0"
    (file,) = written.glob("*/*_MMStar.tsv")
    model = file.parent.name
    nothing_asked = {"class": "LMDeployAPI", "model": model, "api_base": "http://127.0.0.1:9/v1"}
    file.rename(file.with_name(f"{model}_digits.tsv"))
    run_kit(folder, written, {model: nothing_asked}, "--mode", "eval", "--reuse")
    (file,) = written.glob(f"{model}/**/{model}_digits_*_result.tsv")
    assert_verdicts_are_ours(file, tmp_path)
    scores = json.loads((tmp_path / "run/suite/tiny/scores.json").read_text())["scores"]
    ours = scores["mmstar"]["nothink"]
    hits = sum(row["hit"] == "1" for row in table(file)) / ROWS
    assert ours["score"]["value"] - 1e-9 <= hits <= ours["upper"] + 1e-9
