"""`r1v3 doctor` says what is really installed."""

import importlib.metadata
import io
import sys
from pathlib import Path

import pytest
import torch

from r1v3 import _C, doctor


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_report_states_the_installed_versions(tmp_path: Path) -> None:
    """Fails if a check prints something other than what this process runs."""
    checks = by_name(doctor.report(tmp_path))
    assert checks["torch"].finding.startswith(torch.__version__)
    assert checks["compiled kernels"].status == "ok"
    assert checks["compiled kernels"].finding.startswith(_C.cpu_capability())
    assert str(tmp_path) in checks["disk"].finding


def test_what_training_at_scale_wants_is_listed(tmp_path: Path) -> None:
    """Fails if an optional package that is missing goes unmentioned, or is called a problem."""
    checks = by_name(doctor.report(tmp_path))
    for name in ("megatron-core", "flash-attn", "vllm", "nvidia-ml-py", "wandb"):
        assert checks[name].status == "ok"
        try:
            assert checks[name].finding == importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert checks[name].finding.startswith("not installed (optional: ")


def test_another_version_is_a_note_and_a_missing_package_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a version that was never tested, or no version at all, is called fine."""
    pins = tmp_path / "constraints.txt"
    pins.write_text("# comment\ntorch==0.1\nNo_Such.Package==3\n")
    monkeypatch.setattr(doctor, "PINNED", ("torch", "no-such-package"))
    checks = doctor.report(tmp_path, pins)
    found = by_name(checks)
    assert found["torch"].status == "note" and "tested with 0.1" in found["torch"].finding
    assert found["no-such-package"].status == "problem"
    assert "no-such-package==3" in found["no-such-package"].finding
    assert not doctor.healthy(checks)


def test_a_missing_extension_is_a_note_that_names_the_consequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a build that was skipped goes unmentioned: every kernel would just be slow."""
    monkeypatch.setitem(sys.modules, "r1v3._C", None)
    check = by_name(doctor.report(tmp_path))["compiled kernels"]
    assert check.status == "note"
    assert "reference runs" in check.finding


def test_printed_report_marks_what_is_wrong() -> None:
    """Fails if a problem reads like the other lines or the sum is wrong."""
    out = io.StringIO()
    doctor.print_report(
        [doctor.Check("a", "ok", "fine"), doctor.Check("long name", "problem", "broken")], out
    )
    lines = out.getvalue().splitlines()
    assert lines[0] == "a          fine"
    assert lines[1] == "long name  [problem] broken"
    assert lines[-1] == "1 problem found"
