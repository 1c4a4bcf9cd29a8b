"""lmms-eval as a client of `r1v3 serve`: unchanged, with the scores that our rules give."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests_stacks.serving import ROOT, r1v3, serving, verdicts

pytest.importorskip("lmms_eval")

ROWS = 24


@pytest.fixture(scope="module", params=["tiny-internvl-nothink", "tiny-internvl"])
def samples(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """Answers that lmms-eval kept, in mode NoThink and in slow thinking."""
    folder = tmp_path_factory.mktemp("lmms-eval")
    write = r1v3("tests_stacks.digits", "write", folder / "data", str(ROWS))
    subprocess.run(write, cwd=ROOT, check=True)
    with serving() as address:
        settings = f"model={request.param},base_url={address},api_key=x,timeout=120"
        command = [sys.executable, "-m", "lmms_eval", "--model", "openai"]
        command += ["--model_args", settings, "--tasks", "digits", "--batch_size", "1"]
        command += ["--include_path", str(folder / "data/task")]
        command += ["--log_samples", "--output_path", str(folder / "out")]
        environment = {**os.environ, "OPENAI_API_KEY": "x", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment, cwd=folder)
    (file,) = folder.glob("out/*/*_samples_digits.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_scores_are_ours(samples: list[dict[str, Any]], tmp_path: Path) -> None:
    """Fails if a request of lmms-eval is refused, or an answer counts otherwise than by our rules.

    Its task counts the letter of the last box, which is what ours finds where there is one.
    """
    assert len(samples) == ROWS
    answers, theirs = [], []
    for sample in samples:
        responses = sample["filtered_resps"]
        text = responses if isinstance(responses, str) else responses[0]
        assert text
        answers.append({"text": text, "answer": sample["target"], "options": ["", "", ""]})
        theirs.append(bool(sample["acc"]))
    assert [bool(one["report"]) for one in verdicts(answers, tmp_path)] == theirs
