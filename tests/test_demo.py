"""The whole demo on tiny configurations: killed, resumed, and what it leaves behind."""

import functools
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from r1v3.data.schema import load_samples
from r1v3.suite.table import File, read_table
from r1v3.trainer.metrics import read_metrics
from tests.tiny_run import digest, home, leftovers, result, succeed, verb, write_configs

RUN = "runs/demo-1"
STAGES = ("sft", "grpo", "connector")
EVALUATED = ("base", "sft", "grpo", "connector", "selected")


@functools.cache
def whole() -> tuple[Path, list[str]]:
    """An uninterrupted demo with seed 3, and what it changed."""
    folder = home() / "demo"
    write_configs(folder)
    return folder, succeed(folder, "demo", "--configs", "configs", "--seed", "3").changes


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def left(folder: Path) -> dict[str, Any]:
    """Files on which two demos of one seed must agree."""
    run = folder / RUN
    summary = load(run / "summary.json")
    del summary["seconds"]
    return {
        "summary": summary,
        "selection": load(run / "selection.json"),
        "evaluation": {path.name: load(path) for path in (run / "evaluation").glob("*.json")},
        "transcripts": {path.name: load(path) for path in (run / "transcripts").glob("*.json")},
        "selected": digest(run / "models/selected/model.safetensors"),
        "stages": {stage: result(run, stage) for stage in STAGES},
        "data": {path.name: digest(path) for path in (run / "data").glob("*.parquet")},
    }


def test_a_demo_killed_many_times_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """Otherwise a laptop that was switched off would show other numbers than one that was not,
    or start from the beginning; the seed is remembered, not given again."""
    _, changes = whole()
    write_configs(tmp_path)
    rng = random.Random(7)
    seed = ["--seed", "3"]
    moments = [rng.randrange(8, len(changes) // 3) for _ in range(3)]
    for moment in moments:
        flags = ["--resume"] if (tmp_path / RUN / "seed.json").exists() else seed
        killed = verb(tmp_path, "demo", "--configs", "configs", *flags, at=moment)
        assert killed.code in (0, -signal.SIGKILL), killed.output
        if killed.code == 0:
            break
    succeed(tmp_path, "demo", "--configs", "configs", "--resume")
    expected = left(whole()[0])
    for key, value in left(tmp_path).items():
        assert value == expected[key], key
    assert leftovers(tmp_path / RUN) == []
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-1"]


def test_the_questions_are_left_in_the_kits_format() -> None:
    """Fails if a kit cannot ask the questions that the demo's scores are of, or asks others."""
    run = whole()[0] / RUN
    table = read_table(run / "LMUData", File("R1V3_Digits.tsv"))
    asked = [
        sample
        for name in ("test_in_domain", "test_out_of_domain")
        for sample in load_samples(run / "data" / f"{name}.parquet")
    ]
    assert [row["answer"] for row in table.rows] == [one.ground_truth for one in asked]
    assert [row["category"] for row in table.rows] == [one.domain for one in asked]
    assert all(row.pictures == 1 for row in table.rows)


def test_the_summary_holds_every_field_of_every_stage() -> None:
    """Otherwise a table or a figure of the report would be missing."""
    summary = load(whole()[0] / RUN / "summary.json")
    assert summary["seed"] == 3 and summary["base"] == str(home() / "base")
    assert tuple(summary["stages"]) == EVALUATED
    for name, stage in summary["stages"].items():
        modes = ["nothink"] if name == "base" else ["slow", "nothink", "nowait"]
        modes += ["budget-6"] if name in ("grpo", "selected") else []
        assert list(stage["modes"]) == modes
        assert stage["checkpoint"].endswith(name)
        for scores in stage["modes"].values():
            assert set(scores["domains"]) == {"arithmetic", "comparison", "ordering", "counting"}
            assert scores["in_domain"]["questions"] == 6
            assert scores["out_of_domain"]["questions"] == 4
            for score in (scores["in_domain"], scores["out_of_domain"]):
                assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
    assert set(summary["gain"]) == {
        "grpo_minus_sft",
        "connector_minus_grpo",
        "selected_minus_grpo",
    }
    assert all(gain["questions"] == 6 for gain in summary["gain"].values())
    stages = ["data", "sft", "grpo", "connector", "select", "evaluation"]
    assert [name for name in summary["seconds"] if name != "report"] == stages
    assert set(summary["parameters"]) == {"vision", "connector", "llm"}
    assert summary["vocabulary"] > 256


def test_the_demo_leaves_a_report_and_resolved_configurations() -> None:
    """Otherwise a person would have numbers and nothing to look at, or not know what ran."""
    run = whole()[0] / RUN
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    names = {path.stem for path in (run / "config").glob("*.yaml")}
    assert {"data", "sft", "grpo", "connector", *(f"eval-{n}" for n in EVALUATED)} <= names


def test_selection_uses_what_training_measured() -> None:
    """Otherwise the checkpoint chosen would not be the one whose entropy the figure shows."""
    run = whole()[0] / RUN
    lines = {line["step"]: line for line in read_metrics(run / "metrics/grpo.jsonl")}
    selection = load(run / "selection.json")
    text = json.dumps(selection)
    for step in (2, 4):
        window = [lines[s] for s in range(max(1, step - 4), step + 1)]
        seen = [line for line in window if line["critical_tokens"]]
        tokens = sum(line["critical_tokens"] for line in seen)
        mean = sum(line["critical_entropy"] * line["critical_tokens"] for line in seen) / tokens
        assert repr(mean)[:12] in text
        assert repr(lines[step]["validation_accuracy"]) in text
    chosen = digest(run / "models/selected/model.safetensors")
    saved = [digest(p) for p in (run / "checkpoints/grpo").glob("step-*/model.safetensors")]
    assert chosen in saved


def test_scores_are_reused_only_for_the_same_weights(tmp_path: Path) -> None:
    """Otherwise one checkpoint would be reported with the scores of another."""
    folder, _ = whole()
    run = folder / RUN
    equal = digest(run / "models/selected/model.safetensors") == digest(
        run / "models/grpo/model.safetensors"
    )
    assert (run / "transcripts/selected.json").exists() != equal
    shutil.copytree(folder / "runs", tmp_path / "runs")
    write_configs(tmp_path)
    mine = tmp_path / RUN
    # With one checkpoint left, the selected weights are the last ones, or are not.
    keep = "step-000002" if equal else "step-000004"
    for path in (mine / "checkpoints/grpo").glob("step-*"):
        if path.name != keep:
            shutil.rmtree(path)
    (mine / "evaluation/selected.json").unlink()
    (mine / "transcripts/selected.json").unlink(missing_ok=True)
    succeed(tmp_path, "demo", "--configs", "configs", "--resume")
    selected, grpo = load(mine / "evaluation/selected.json"), load(mine / "evaluation/grpo.json")
    assert selected.pop("checkpoint") == f"{RUN}/models/selected"
    assert grpo.pop("checkpoint") == f"{RUN}/models/grpo"
    assert (mine / "transcripts/selected.json").exists() == equal
    if not equal:
        assert selected == grpo


def test_runs_are_numbered_and_never_overwritten(tmp_path: Path) -> None:
    """Otherwise a second `make demo` would destroy or continue the first."""
    write_configs(tmp_path)
    (tmp_path / "runs/demo-9").mkdir(parents=True)
    (tmp_path / "runs/demo-x").mkdir()
    killed = verb(tmp_path, "demo", "--configs", "configs", at=12)
    assert killed.code == -signal.SIGKILL
    assert (tmp_path / "runs/demo-10/seed.json").exists()
    again = verb(tmp_path, "demo", "--configs", "configs", "--run", "runs/demo-10")
    assert "runs/demo-10 already holds a run; pass --resume" in again.error()


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--resume"], "there is no runs/demo-N to resume; start without --resume"),
        (["--resume", "--run", "mine"], "mine holds no demo to resume; start without --resume"),
        (["--configs", "nowhere"], "no folder nowhere: run from the repository"),
    ],
)
def test_a_demo_that_cannot_start_says_why(tmp_path: Path, flags: list[str], wanted: str) -> None:
    """Otherwise a mistyped folder would start a new run instead of going on."""
    arguments = flags if "--configs" in flags else ["--configs", str(write_configs(tmp_path))]
    arguments += [] if "--configs" in flags else flags
    assert wanted in verb(tmp_path, "demo", *arguments).error()
    assert not (tmp_path / "runs").exists() and not (tmp_path / "mine").exists()


def test_ctrl_c_in_a_demo_says_how_to_go_on(tmp_path: Path) -> None:
    """Otherwise the minutes spent would look lost."""
    write_configs(tmp_path)
    _, changes = whole()
    at = next(n for n, path in enumerate(changes, 1) if path.endswith("metrics/grpo.jsonl"))
    stopped = verb(
        tmp_path, "demo", "--configs", "configs", "--seed", "3", at=at, number=signal.SIGINT
    )
    assert stopped.code == 130
    assert "--resume" in stopped.output and "Traceback" not in stopped.output
    assert (tmp_path / RUN / "checkpoints/grpo/step-000001/manifest.json").exists()
