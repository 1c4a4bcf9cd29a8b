"""Connector-only tuning, run for real on a tiny model."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from r1v3.trainer.metrics import read_metrics
from tests.tiny_run import check_kills, finished, home, seeded_moments


def test_only_the_connector_changes() -> None:
    """Otherwise connector-only tuning would be another round of supervised tuning."""
    folder, _ = finished("connector")
    before = load_file(home() / "base/model.safetensors")
    after = load_file(folder / "run/models/connector/model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_gradients_are_of_the_connector_alone() -> None:
    """Otherwise memory and time would go into gradients that are thrown away."""
    folder, _ = finished("connector")
    for line in read_metrics(folder / "run/metrics/connector.jsonl"):
        assert line["grad_norm_connector"] > 0
        assert line["grad_norm_vision"] == line["grad_norm_llm"] == 0


def test_the_weights_of_the_best_validation_are_handed_on() -> None:
    """Otherwise early stopping would hand on weights that had already become worse."""
    folder, _ = finished("connector")
    lines = read_metrics(folder / "run/metrics/connector.jsonl")
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = min(losses, key=lambda step: (losses[step], step))
    kept = load_file(folder / "run/checkpoints/connector-best/model.safetensors")
    published = load_file(folder / "run/models/connector/model.safetensors")
    assert all(kept[name].equal(published[name]) for name in kept)
    path = folder / f"run/checkpoints/connector/step-{best:06d}/model.safetensors"
    if path.exists():
        assert all(value.equal(published[name]) for name, value in load_file(path).items())


@pytest.mark.parametrize("chain", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_and_resume_change_no_bit(tmp_path: Path, chain: int) -> None:
    """Otherwise a cluster's preemption would change results."""
    moments = seeded_moments("connector", 2)
    check_kills(tmp_path, "connector", moments if chain else moments[::-1])
