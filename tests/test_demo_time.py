"""The time that the demo tells at its start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1v3.config import GRPO, SFT, Connector, Data, Evaluate, load
from r1v3.demo_time import Speed, expected_seconds, measure
from tests.tiny_run import home, write_configs

KINDS = {"data": Data, "sft": SFT, "grpo": GRPO, "connector": Connector, "eval": Evaluate}


def seconds(speed: Speed, folder: Path, *overrides: str) -> float:
    given = {
        name: load(kind, write_configs(folder) / f"{name}.yaml", []) for name, kind in KINDS.items()
    }
    for override in overrides:
        stage, setting = override.split(".", 1)
        given[stage] = load(KINDS[stage], folder / f"configs/{stage}.yaml", [setting])
    scoring = given.pop("eval")
    return expected_seconds(speed, given, scoring)


def test_every_piece_of_work_is_timed_and_nothing_is_changed() -> None:
    """Fails if a piece costs nothing, or measuring changes the weights or torch's threads."""
    before = (home() / "base/model.safetensors").read_bytes()
    threads = torch.get_num_threads()
    speed = measure(home() / "base", load(Data, home() / "data.yaml", []))
    assert all(value > 0 for value in vars(speed).values())
    assert torch.get_num_threads() == threads
    assert (home() / "base/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("piece", "override"),
    [
        ("sample", "data.sft=40"),
        ("encoded", "data.grpo=96"),
        ("pair", "data.sft=40"),
        ("response", "grpo.group_size=8"),
        ("prompt", "grpo.prompts_per_step=8"),
        ("completion", "eval.samples=8"),
    ],
)
def test_more_work_takes_longer(piece: str, override: str, tmp_path: Path) -> None:
    """Fails if the time told does not follow the configuration."""
    none = Speed(*[0.0] * 6)
    speed = replace(none, **{piece: 1.0})
    assert seconds(speed, tmp_path) < seconds(speed, tmp_path, override)
    assert seconds(none, tmp_path) == 0
