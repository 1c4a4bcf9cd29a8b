"""The command line as a person meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import r1v3.__main__
from r1v3.cli import _error_line, app
from r1v3.doctor import Check
from tests.tiny_run import Outcome, finished, home, succeed, verb

VERBS = (
    *("demo", "data", "sft", "grpo", "connector", "select", "eval", "suite", "generate", "report"),
)
RUNNER = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command_line_loads_nothing_heavy() -> None:
    """Otherwise `r1v3 --help` and every misspelled key would take seconds to answer."""
    program = (
        "import sys, r1v3.cli, r1v3.config, r1v3.trainer.interrupt\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_python_m_r1v3_refuses_a_bad_configuration_without_loading_torch(tmp_path: Path) -> None:
    """Otherwise the entry point would differ from the app that the other tests call."""
    (tmp_path / "bad.yaml").write_text("run: run\nlearning_rate: 1\n")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "r1v3", "sft", "bad.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: bad.yaml: " in done.stderr and "unknown key `learning_rate`" in done.stderr
    assert "| torch\n" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("own", "policy", "spins"),
    [
        ({}, "PASSIVE", "0"),
        ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", "30000000000"),
        pytest.param({"GOMP_SPINCOUNT": "77"}, "PASSIVE", "77", marks=pytest.mark.slow),
    ],
)
def test_waiting_threads_yield_unless_told_otherwise(
    own: dict[str, str], policy: str, spins: str
) -> None:
    """Otherwise, beside other programs, threads that wait would burn the cores that the threads
    they wait for need: a step took ten times as long."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-m", "r1v3", "doctor"],
        env={**inherited, **own, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch was built with another OpenMP than GNU's")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.parametrize("name", (*VERBS, "doctor"))
def test_every_verb_explains_itself(name: str) -> None:
    """Otherwise a person would have to read the source; every verb shows an example."""
    result = RUNNER.invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"r1v3 {name}" in result.output.split("Example: ")[1]


def test_the_help_lists_every_verb() -> None:
    """Otherwise a verb could not be found."""
    listed = RUNNER.invoke(app, ["--help"]).output
    assert all(f" {name} " in listed for name in (*VERBS, "doctor"))
    assert RUNNER.invoke(app, ["fly"]).exit_code == 2


def test_doctor_reports_and_its_exit_code_says_whether_all_is_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a script could not tell a broken installation from a working one."""
    import r1v3.doctor

    result = RUNNER.invoke(app, ["doctor"])
    checks = r1v3.doctor.report()
    assert result.exit_code == (0 if r1v3.doctor.healthy(checks) else 1)
    assert all(check.name in result.output for check in checks)
    monkeypatch.setattr(r1v3.doctor, "report", lambda: [Check("torch", "problem", "not there")])
    broken = RUNNER.invoke(app, ["doctor"])
    assert broken.exit_code == 1 and "[problem] not there" in broken.output
    assert "error:" not in broken.output


def a_picture(folder: Path) -> Path:
    from r1v3.data.schema import load_samples

    picture = folder / "digits.png"
    picture.write_bytes(load_samples(home() / "run/data/grpo.parquet")[0].images[0])
    return picture


def test_generate_answers_about_a_picture_of_ones_own(tmp_path: Path) -> None:
    """Otherwise a trained model could not be tried out; the same seed gives the same answer."""
    run = finished("sft")[0] / "run"
    question = ["generate", "--checkpoint", str(run), "--image", str(a_picture(tmp_path))]
    question += ["--question", "Compute the result.", "--max-tokens", "12"]
    first = succeed(tmp_path, *question)
    assert first.output.startswith("<think>\n")
    assert "models/sft: 12 tokens" in first.output or " tokens" in first.output
    warm = [*question, "--temperature", "1", "--seed", "4"]
    assert succeed(tmp_path, *warm).output == succeed(tmp_path, *warm).output
    plain = succeed(tmp_path, *question, "--mode", "nothink")
    assert not plain.output.startswith("<think>")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (["--mode", "fast"], "mode 'fast' is not one of slow, nothink, nowait"),
        (["--mode", "nothink", "--budget", "3"], "mode nothink has none"),
        (["--question", " "], "--question is empty"),
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
        (["--checkpoint", "nowhere"], "neither a model folder nor a run folder"),
    ],
)
def test_generate_names_what_is_wrong(tmp_path: Path, change: list[str], wanted: str) -> None:
    """Otherwise a typing error would be a traceback."""
    arguments = ["generate", "--checkpoint", str(home() / "base")]
    arguments += ["--image", str(a_picture(tmp_path)), "--question", "What?", *change]
    assert wanted in verb(tmp_path, *arguments).error()


def scored(outcome: Outcome) -> list[str]:
    """Modes whose scores out of domain were printed; other lines are about the progress."""
    lines = [line.split() for line in outcome.output.splitlines()]
    return [words[0] for words in lines if words[1:2] == ["out_of_domain"]]


def test_eval_prints_scores_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """Otherwise an interrupted evaluation would score every mode again."""
    from tests.tiny_run import write_configs

    write_configs(tmp_path)
    arguments = ["eval", "configs/eval.yaml", f"model={home() / 'base'}", "name=base"]
    arguments += [f"data=[{home() / 'run/data/test_out_of_domain.parquet'}]", "budgets=[]"]
    arguments += ["transcripts=0"]
    first = succeed(tmp_path, *arguments, "modes=[slow]")
    assert scored(first) == ["slow"]
    record = json.loads((tmp_path / "run/evaluation/base.json").read_text())
    again = succeed(tmp_path, *arguments, "modes=[slow, nothink]")
    assert scored(again) == ["nothink"] and "slow" not in again.output
    extended = json.loads((tmp_path / "run/evaluation/base.json").read_text())
    assert extended["modes"]["slow"] == record["modes"]["slow"]
    assert extended["correct"] == record["correct"]


def test_report_of_an_unfinished_run_is_written() -> None:
    """Otherwise a run that stopped could not be looked at."""
    folder, _ = finished("sft")
    outcome = succeed(folder, "report", "run")
    assert outcome.output.strip().splitlines()[-1].endswith("report.html")
    assert "<html" in (folder / "run/report.html").read_text(encoding="utf-8")


def test_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    """Otherwise a mistyped run folder would get an empty report."""
    assert "nowhere" in verb(tmp_path, "report", "nowhere").error()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("missing", "extra"),
    [("sklearn.datasets", "demo"), ("matplotlib", "demo"), ("megatron.core", "megatron")],
)
def test_a_missing_package_names_the_extra_that_brings_it(missing: str, extra: str) -> None:
    """Fails if whoever installed a part of r1v3 must guess what a verb needs."""
    error = ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    assert _error_line(error).endswith(f"; pip install 'r1v3[{extra}]'")


@pytest.mark.parametrize("name", ["numpy", "r1v3.nowhere", "sklearn_extra", None])
def test_other_missing_modules_are_left_as_they_are(name: str | None) -> None:
    """Fails if a broken installation is explained by an extra that does not help."""
    assert _error_line(ModuleNotFoundError("gone", name=name)) == "error: gone"


def test_without_typer_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if `pip install r1v3 && r1v3` ends in a traceback."""
    monkeypatch.delitem(sys.modules, "r1v3.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        r1v3.__main__.main()
    assert "pip install" in str(stop.value)


@pytest.mark.parametrize(
    ("verb", "wanted"),
    [
        ("grpo", "interrupted; what was saved is kept: go on with --resume\n"),
        ("eval", "interrupted; what was saved is kept: start it again to go on\n"),
        ("distill", "interrupted; what was saved is kept: start it again to go on\n"),
        ("select", "interrupted\n"),
    ],
)
def test_ctrl_c_names_the_way_that_a_verb_goes_on(
    monkeypatch: pytest.MonkeyPatch, verb: str, wanted: str
) -> None:
    """Fails if a verb without `--resume` sends people to it, or ends in a traceback."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("r1v3.config.load", interrupted)
    done = RUNNER.invoke(app, [verb, "some.yaml"])
    assert (done.exit_code, done.stderr) == (130, wanted)
