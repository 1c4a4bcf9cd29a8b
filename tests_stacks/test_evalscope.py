"""evalscope as a client of `r1v3 serve`: unchanged, with the scores that our rules give."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests_stacks.serving import ROOT, r1v3, serving, verdicts

pytest.importorskip("evalscope")

ROWS, REPEATS = 12, 5


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Five answers to each question that evalscope kept, in mode NoThink."""
    folder = tmp_path_factory.mktemp("evalscope")
    write = r1v3("tests_stacks.digits", "write", folder / "data", str(ROWS))
    subprocess.run(write, cwd=ROOT, check=True)
    data = {"general_vmcq": {"local_path": str(folder / "data"), "subset_list": ["digits"]}}
    with serving() as address:
        command = [Path(sys.executable).with_name("evalscope"), "eval"]
        command += ["--model", "tiny-internvl-nothink", "--api-url", address, "--api-key", "x"]
        command += ["--eval-type", "openai_api", "--datasets", "general_vmcq"]
        command += ["--dataset-args", json.dumps(data), "--repeats", str(REPEATS)]
        command += ["--generation-config", json.dumps({"temperature": 1.0, "max_tokens": 48})]
        command += ["--work-dir", folder / "out", "--no-timestamp"]
        subprocess.run(list(map(str, command)), check=True)
    file = folder / "out/reviews/tiny-internvl-nothink/general_vmcq_digits.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_question_is_answered_so_often(reviews: list[dict[str, Any]]) -> None:
    """Fails if a request of evalscope is refused or an answer lost."""
    assert len(reviews) == ROWS * REPEATS
    assert {review["sample_score"]["score"]["status"] for review in reviews} == {"success"}


def test_scores_are_ours(reviews: list[dict[str, Any]], tmp_path: Path) -> None:
    """Fails if an answer counts otherwise there than by the rules of `r1v3 suite`.

    Where a rule of ours gives no verdict (the text names no option), the kit counts wrong.
    """
    answers, theirs = [], []
    for review in reviews:
        score = review["sample_score"]["score"]
        (gold,) = review["target"]
        answers.append({"text": score["prediction"], "answer": gold, "options": ["", "", ""]})
        theirs.append(bool(score["value"][score["main_score_name"]]))
    ours = verdicts(answers, tmp_path)
    assert [bool(one["report"]) for one in ours] == theirs
    assert 0 < sum(theirs) < len(theirs)
