"""The files of the handwriting recipe."""

import json
from pathlib import Path

from r1v3.config import Data, Teacher
from r1v3.data.recipe import build
from r1v3.data.schema import load_samples
from r1v3.data.tasks import IN_DOMAIN, OUT_OF_DOMAIN

COUNTS = {
    "base": 8,
    "base_validation": 8,
    "skills": 8,
    "skills_validation": 8,
    "sft": 9,
    "sft_validation": 3,
    "grpo": 6,
    "grpo_validation": 3,
    "connector": 8,
    "connector_validation": 4,
    "test_in_domain": 6,
    "test_out_of_domain": 4,
}
SPLIT = {
    "base": "train",
    "skills": "train",
    "skills_validation": "validation",
    "sft": "train",
    "connector": "train",
    "grpo": "rl",
    "base_validation": "validation",
    "sft_validation": "validation",
    "grpo_validation": "validation",
    "connector_validation": "validation",
    "test_in_domain": "test",
    "test_out_of_domain": "test",
}


def test_every_dataset_is_written_with_its_count_from_its_split(tmp_path: Path) -> None:
    lines: list[str] = []
    paths = build(Data(run=tmp_path, **COUNTS), lines.append)
    assert set(paths) == set(COUNTS) and len(lines) == len(COUNTS)
    for name, path in paths.items():
        assert path == tmp_path / "data" / f"{name}.parquet"
        samples = load_samples(path)
        assert len(samples) == COUNTS[name]
        assert {s.split for s in samples} == {SPLIT[name]}
        domains = {s.domain for s in samples}
        if name == "test_out_of_domain":
            assert domains == set(OUT_OF_DOMAIN)
        elif not name.startswith(("base", "skills")):
            assert not domains & set(OUT_OF_DOMAIN)
        if name in ("sft", "grpo", "test_in_domain"):
            assert domains == set(IN_DOMAIN)
    statistics = json.loads((tmp_path / "data" / "statistics.json").read_text())
    for name, count in COUNTS.items():
        assert statistics[name]["samples"] == count
        assert sum(statistics[name]["domains"].values()) == count
    account = statistics["chains_train"]
    assert account["questions_kept"] == 9
    assert account["chains_written"] == account["chains_rejected"] + 9


def test_a_count_of_zero_leaves_a_dataset_out(tmp_path: Path) -> None:
    assert set(build(Data(run=tmp_path, grpo=2))) == {"grpo"}
    assert {p.name for p in (tmp_path / "data").iterdir()} == {"grpo.parquet", "statistics.json"}


def test_files_that_are_there_are_kept_and_their_statistics_too(tmp_path: Path) -> None:
    """An interrupted build goes on; what the report tells about the first part must stay."""
    first = build(Data(run=tmp_path, sft=3))["sft"]
    before = first.read_bytes()
    paths = build(Data(run=tmp_path, sft=3, test_in_domain=3))
    assert first.read_bytes() == before
    assert set(paths) == {"sft", "test_in_domain"}
    statistics = json.loads((tmp_path / "data" / "statistics.json").read_text())
    assert statistics["sft"]["samples"] == 3
    assert statistics["test_in_domain"]["samples"] == 3
    assert "chains_train" in statistics


def test_the_same_configuration_writes_the_same_samples(tmp_path: Path) -> None:
    counts = {"sft": 3, "grpo": 3}
    runs = [build(Data(run=tmp_path / name, **counts)) for name in "ab"]
    for name in counts:
        first, second = (load_samples(run[name]) for run in runs)
        assert first == second


def test_the_teacher_of_the_configuration_writes_the_chains(tmp_path: Path) -> None:
    sure = Teacher(doubt=0.0, slip=0.0, check=0.0)
    path = build(Data(run=tmp_path, teacher=sure, sft=6))["sft"]
    for sample in load_samples(path):
        assert not any(w in str(sample.response) for w in ("Wait", "Hmm", "Alternatively"))
