"""Curricula of GRPO: their questions, when stages change, and going on in the middle of one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1v3.config import GRPO, ConfigError, Range, load
from r1v3.data.schema import load_samples, write_samples
from r1v3.trainer.curriculum import Course, facts_of, grouped_accuracy, matches
from r1v3.trainer.grpo import GRPOTrainer
from r1v3.trainer.metrics import comparable, read_metrics
from tests.tiny_run import home, write_configs
from tests.trainer.test_questions import order

STAGES = (
    "curriculum.stages=[{where: {difficulty: normal}, steps: 2}, "
    "{where: {difficulty: hard}, learning_rate: 5e-4, max_tokens: 8, plateau: 1}, {}]"
)


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ({}, True),
        ({"difficulty": "hard"}, True),
        ({"difficulty": "normal"}, False),
        ({"difficulty": ("normal", "hard")}, True),
        ({"digits": 4.0}, True),
        ({"digits": 3.0}, False),
        ({"digits": Range(least=3)}, True),
        ({"digits": Range(least=3, most=3.5)}, False),
        ({"difficulty": Range(most=3)}, False),
        ({"pass_rate": Range(most=0.5)}, False),
        ({"difficulty": "hard", "digits": 5.0}, False),
        ({"sure": "True"}, True),
    ],
)
def test_where_chooses_by_value_one_of_several_or_range(where: Any, wanted: bool) -> None:
    """Fails if a stage asks questions of another difficulty, or a missing value matches."""
    facts = {"difficulty": "hard", "digits": 4, "sure": True, "pass_rate": None}
    assert matches(facts, where) == wanted


def course(*stages: dict[str, Any], count: int = 10) -> Course:
    text = json.dumps(list(stages))
    config = load(GRPO, None, [
        "run=r", "model=m", "train_data=a", "validation_data=v", "steps=50", "seed=5",
        "optimizer.learning_rate=1e-3", f"curriculum.stages={text}",
    ])  # fmt: skip
    facts = [{"level": n % 2} for n in range(count)]
    asked = {Path("a"): facts, Path("b"): facts[:4]}
    return Course(config, asked, facts)


def test_without_a_curriculum_questions_come_as_ever() -> None:
    """Fails if a run without a curriculum asks its questions in another order than before."""
    made = course()
    assert made.questions().take(25) == order(10, 0, 25, 5, "grpo")
    assert not made.advance(40) and made.current.max_tokens is None


def test_stages_end_by_steps_or_by_a_plateau_of_their_own_questions() -> None:
    """Fails if a stage ends too early or too late, asks what is not its own, or another stage's
    accuracies count for its plateau."""
    made = course(
        {"where": {"level": 1}, "steps": 3},
        {"where": {"level": 0}, "plateau": 2, "train_data": "b"},
        {"learning_rate": 0.5},
    )
    assert set(made.questions().take(20)) == {1, 3, 5, 7, 9}
    assert [made.advance(step) for step in (1, 2, 3)] == [False, False, True]
    assert set(made.questions().take(20)) == {10, 12}  # of the second file
    odd_better = [[0.1, 0.1], [0.1, 0.5], [0.1, 0.9]]
    for step, (even, odd) in enumerate(odd_better, start=4):
        made.validated([even, odd] * 5)
        assert made.advance(step) == (step == 6)
    assert made.optimizer(SimpleNamespace(model_copy=lambda update: update)) == {  # type: ignore[arg-type]
        "learning_rate": 0.5
    }
    assert not made.advance(49)
    again = course(*[{"steps": 1}, {"steps": 1}, {}])
    again.restore(made.state())
    assert again.state() == made.state() and again.number == 2


@pytest.mark.parametrize(
    ("stages", "wanted"),
    [
        ([{"where": {"level": 7}}], r"stage 1 has no question in a \(level: 0, 1\)"),
        ([{"where": {"colour": "x"}}], "colour: no row has it"),
        ([{}, {}], "stage 1 must end"),
        ([{"steps": 3}], "the last stage goes on to the end"),
        ([{"where": {"level": {}}}], "`least` or `most`"),
    ],
)
def test_a_curriculum_that_cannot_run_is_refused(stages: Any, wanted: str) -> None:
    """Fails if a stage without questions, or without an end, is found out in the night."""
    with pytest.raises((ValueError, ConfigError), match=wanted):
        course(*stages)


def test_measured_pass_rates_are_joined_by_name(tmp_path: Path) -> None:
    """Fails if a pass rate is given to another question, or a damaged line goes unnoticed."""
    samples = load_samples(home() / "run/data/grpo.parquet")[:3]
    one = samples[1]
    file = tmp_path / "rates.jsonl"
    keys = {"data_source": one.data_source, "split": one.split, "index": one.index}
    file.write_text(json.dumps(keys | {"pass_rate": 0.25, "difficulty": "hard"}) + "\n")
    facts = facts_of(samples, file)
    assert [each.get("pass_rate") for each in facts] == [None, 0.25, None]
    assert facts[1]["difficulty"] == "hard" and facts[1]["domain"] == one.domain
    file.write_text('{"index": 3}\n')
    with pytest.raises(ValueError, match="line 1 must be JSON with data_source"):
        facts_of(samples, file)


def test_accuracy_is_told_for_each_value() -> None:
    """Fails if a set is scored with the questions of another, or those of none."""
    facts = [{"d": "hard"}, {"d": "normal"}, {"d": "hard"}, {}]
    assert grouped_accuracy([1, 0.5, 0, 1], facts, "d") == {"hard": 0.5, "normal": 0.5}


def graded(folder: Path) -> list[str]:
    """Overrides that name the tiny data, half of it hard."""
    texts = []
    for key in ("grpo", "grpo_validation"):
        rows = [
            sample.model_copy(
                update={"extra_info": sample.extra_info | {"difficulty": ("normal", "hard")[n % 2]}}
            )
            for n, sample in enumerate(load_samples(home() / f"run/data/{key}.parquet"))
        ]
        write_samples(folder / f"{key}.parquet", rows)
        name = "train_data" if key == "grpo" else "validation_data"
        texts.append(f"{name}={folder / f'{key}.parquet'}")
    return texts


def trainer(folder: Path, name: str, steps: int, *overrides: str, resuming: bool) -> GRPOTrainer:
    own = [f"run={folder / name}", f"model={home() / 'base'}", f"steps={steps}", STAGES,
           "validate_every=1", "decoding.max_tokens=12", "curriculum.validate_by=difficulty",
           "prompts_per_step=2", "checkpoint_every=50"]  # fmt: skip
    config = load(GRPO, folder / "configs/grpo.yaml", [*own, *overrides])
    return GRPOTrainer(config, resuming=resuming)


def test_a_run_goes_on_in_the_middle_of_a_curriculum(tmp_path: Path) -> None:
    """Fails if a resumed run asks other questions, learns at another rate, changes stages at
    another step, or writes other metrics than one that ran through."""
    write_configs(tmp_path)
    data = graded(tmp_path)
    whole = trainer(tmp_path, "whole", 6, *data, resuming=False)
    whole.loop()
    for steps in (3, 5, 6):
        parts = trainer(tmp_path, "parts", steps, *data, resuming=steps > 3)
        parts.loop()
    lines = [
        comparable(read_metrics(tmp_path / name / "metrics/grpo.jsonl"))
        for name in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    stages = [line["curriculum_stage"] for line in lines[0]]
    assert stages[:3] == [1, 1, 2] and sorted(stages) == stages
    assert {"validation_accuracy_normal", "validation_accuracy_hard"} <= set(lines[0][0])
    rates = [line["learning_rate"] for line in lines[0]]
    assert rates[1] == 1e-3 and rates[2] == 5e-4
    assert lines[0][2]["response_length"] <= 8
    mine, theirs = (dict(made.engine.model.named_parameters()) for made in (whole, parts))
    assert all(mine[key].equal(theirs[key]) for key in mine)
    with pytest.raises(ValueError, match="curriculum.validate_by"):
        trainer(tmp_path, "parts", 7, *data, "curriculum.validate_by=domain", resuming=True)
