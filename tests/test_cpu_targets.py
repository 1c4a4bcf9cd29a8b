"""`python -m benchmarks.cpu_targets`: which targets there are, and when one is met."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cpu_targets, session
from benchmarks.cpu_targets import Target
from benchmarks.ops import OPS

LOSS = {"B": 2, "T": 4, "H": 16, "V": 300, "bits": 32}


def test_every_target_is_a_problem_of_its_op() -> None:
    """Fails if a target asks for a mode or a shape that its benchmark does not have."""
    for target in cpu_targets.targets():
        op, mode, shape = target.case
        assert mode in OPS[op].MODES
        known = {
            name for size in ("small", "full") for s in OPS[op].shapes("cpu", size) for name in s
        }
        assert set(shape) <= known


@pytest.mark.parametrize(
    ("measure", "value", "met"),
    [
        ("x eager", 1.14, False),
        ("x eager", 1.16, True),
        ("x compile", None, False),
        ("share of eager's memory", 1.16, False),
        ("share of eager's memory", 0.3, True),
    ],
)
def test_bounds_have_a_side(measure: cpu_targets.Measure, value: float | None, met: bool) -> None:
    """Fails if more memory than allowed passes, or a time that nobody measured."""
    assert Target("", ("entropy", "forward", {}), measure, 1.15).met_by(value) is met


def test_a_missed_target_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a verdict is not that of what was measured, or the file lacks one."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(session.SECONDS_PER_TASK, "small", 0.0)
    loss = ("linear_grpo_loss", "forward+backward", LOSS)
    easy = Target("loss", loss, "x eager", 0.0)
    wanted = [
        easy,
        replace(easy, measure="share of eager's memory", bound=1e9),
        Target("ban", ("ban_tokens", "forward", {"T": 5, "V": 300, "K": 7}), "x compile", 1e9),
        Target("broken", ("entropy", "forward", {"T": 5}), "x eager", 0.0),
    ]
    monkeypatch.setattr(cpu_targets, "targets", lambda: iter(wanted))
    path = tmp_path / "targets.json"
    assert cpu_targets.main(["--json", str(path)]) == 1
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [one["met"] for one in found["targets"]] == [True, True, False, False]
    ours = found["problems"][0]["implementations"][0]
    assert found["targets"][0]["value"] == ours["over_eager"]
    assert found["targets"][3]["value"] is None and len(found["problems"]) == 2
    assert "missed" in capsys.readouterr().out
    monkeypatch.setattr(cpu_targets, "targets", lambda: iter(wanted[:2]))
    assert cpu_targets.main([]) == 0
